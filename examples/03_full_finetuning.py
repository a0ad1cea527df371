"""Full fine-tuning: every weight is trained, the loss on unseen rows is measured before and after.

    python examples/03_full_finetuning.py
    python examples/03_full_finetuning.py --model Qwen/Qwen3-0.6B --data rows.jsonl --learning-rate 1e-5

Without --model a small random Llama is built here. It has everything to learn, hence the high learning rate; a
model that is trained already forgets what it knows at such rates.
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
parser.add_argument("--output", type=Path, default=Path("outputs/full-finetuning"))
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--learning-rate", type=float, default=2e-3)
options = parser.parse_args()

rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, rows))
splits = rows.train_test_split(test_size=0.1, seed=3407)

# The weights are held in float32, so that small updates are not rounded away; on a GPU the computing is in 16 bits.
model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, full_finetuning=True)

trainer = PantheraMLTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=splits["train"],
    eval_dataset=splits["test"],
    args=PantheraMLTrainingArguments(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",  # a checkpoint has weights and optimizer states: three times the model
    ),
)
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
print(f"Loss per token on unseen rows: {before['eval_loss']:.3f} before, {after['eval_loss']:.3f} after.")

# There is no adapter: save_pretrained writes the model itself.
model.save_pretrained(options.output / "model", tokenizer)
