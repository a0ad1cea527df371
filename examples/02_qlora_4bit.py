"""QLoRA: the base model in 4 bits (NF4), a LoRA adapter in float32 on top, then an answer from the result.

    python examples/02_qlora_4bit.py
    python examples/02_qlora_4bit.py --model Qwen/Qwen3-0.6B --data rows.jsonl --max-steps 60

Without --model a small random Llama is built here; what it says after a few steps is noise.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file; docs/data-formats.md lists the formats that are recognised")
parser.add_argument("--output", type=Path, default=Path("outputs/qlora"))
parser.add_argument("--max-steps", type=int, default=30)
options = parser.parse_args()

rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, rows))

# A quarter of the memory of 16-bit weights: a model of 8 billion parameters takes about 5.5 GB.
model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=True)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing="auto",  # on a GPU: activations are computed twice and not kept
)

trainer = PantheraMLTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=rows,
    args=PantheraMLTrainingArguments(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,  # 8 rows a step with the activations of 2
        learning_rate=2e-4,
        logging_steps=5,
        save_strategy="no",
    ),
)
trainer.train()
model.save_pretrained(options.output / "adapter", tokenizer)

FastLanguageModel.for_inference(model)  # evaluation mode, with the cache of keys and values
question = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print("Answer:", tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
