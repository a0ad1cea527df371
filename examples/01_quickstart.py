"""The whole way in one script: load a model, attach LoRA, train it, save it.

    python examples/01_quickstart.py
    python examples/01_quickstart.py --model Qwen/Qwen3-0.6B --data rows.jsonl --max-steps 60

Without --model a small random Llama is built here, so nothing is downloaded (and nothing sensible is learned).
Without --data the questions and answers inside the package are used.
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
parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
parser.add_argument("--max-steps", type=int, default=30)
options = parser.parse_args()

rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, rows))

model, tokenizer = FastLanguageModel.from_pretrained(
    options.model,
    max_seq_length=512,  # longer rows are cut
    load_in_4bit=False,  # 02_qlora_4bit.py shows the other choice
)

# Only the adapter is trained: about 1 % of the weights, so gradients and optimizer states stay small.
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)

trainer = PantheraMLTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=rows,
    args=PantheraMLTrainingArguments(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        warmup_steps=5,
        logging_steps=5,
    ),
)
trainer.train()

# The adapter is small and needs its base model; the merged model stands alone, for any tool.
model.save_pretrained(options.output / "adapter", tokenizer)
model.save_pretrained_merged(options.output / "merged", tokenizer, save_method="merged_16bit")
