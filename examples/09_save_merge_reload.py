"""Every way of saving a trained adapter, each loaded again without PantheraML and compared with the live model.

    python examples/09_save_merge_reload.py
    python examples/09_save_merge_reload.py --model Qwen/Qwen3-0.6B

It prints how far the next-token probabilities of each saved form are from those of the model in memory.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--output", type=Path, default=Path("outputs/saving"))
parser.add_argument("--max-steps", type=int, default=20)
options = parser.parse_args()

rows = load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, rows))

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16)
arguments = PantheraMLTrainingArguments(
    output_dir=str(options.output / "run"),
    max_steps=options.max_steps,
    learning_rate=1e-3,
    save_strategy="no",
)
PantheraMLTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=arguments).train()

# The adapter: a few MB. It needs the base model, and remembers which one that was.
model.save_pretrained(options.output / "adapter", tokenizer)
# The adapter added to the weights in float32, rounded once to 16 bits: for any tool that reads transformers' folders.
model.save_pretrained_merged(options.output / "merged-16bit", tokenizer, save_method="merged_16bit")
# The same, then quantised to NF4: a quarter of the size, less exact.
model.save_pretrained_merged(options.output / "merged-4bit", tokenizer, save_method="merged_4bit")

# Someone else's script: transformers and PEFT alone.
base = AutoModelForCausalLM.from_pretrained(options.model, dtype=model.dtype)
reloaded = {
    "adapter": PeftModel.from_pretrained(base, options.output / "adapter"),
    "merged-16bit": AutoModelForCausalLM.from_pretrained(options.output / "merged-16bit"),
    "merged-4bit": AutoModelForCausalLM.from_pretrained(options.output / "merged-4bit"),
}


@torch.no_grad()
def next_token(model):
    inputs = tokenizer("What is the capital of France?", return_tensors="pt").to(model.device)
    return model(**inputs).logits[0, -1].float().softmax(-1).cpu()


FastLanguageModel.for_inference(model)
expected = next_token(model)
for name, loaded in reloaded.items():
    weights = sum(file.stat().st_size for file in (options.output / name).glob("*.safetensors"))
    distance = (next_token(loaded.eval()) - expected).abs().max().item()
    print(f"{name}: {weights / 1e6:.1f} MB of weights, probabilities differ by at most {distance:.6f}")
