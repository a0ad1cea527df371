"""Conversations: ShareGPT rows, a chat template, packed rows, and a loss on the assistant's words alone.

    python examples/04_chat_data.py
    python examples/04_chat_data.py --model Qwen/Qwen3-0.6B --data conversations.jsonl --max-steps 60

--data is a JSONL file with a column "conversations": a list of {"from": "human" or "gpt", "value": text}.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from pantheraml import (
    FastLanguageModel,
    PantheraMLTrainer,
    PantheraMLTrainingArguments,
    get_chat_template,
    standardize_sharegpt,
    train_on_responses_only,
)
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help='a JSONL file with a column "conversations"')
parser.add_argument("--output", type=Path, default=Path("outputs/chat"))
parser.add_argument("--max-steps", type=int, default=30)
options = parser.parse_args()


def as_sharegpt(row):
    question = f"{row['instruction']} {row['input'] or ''}".strip()
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": row["output"]}]}


if options.data:
    rows = load_dataset("json", data_files=options.data, split="train")
else:
    rows = load_debug_dataset().map(as_sharegpt).select_columns("conversations")
# The trainer would recognise ShareGPT by itself; here the names are changed to role and content beforehand.
rows = standardize_sharegpt(rows)
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, rows))

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16)
if tokenizer.chat_template is None:  # a chat model brings its own, which is the one to keep
    tokenizer = get_chat_template(tokenizer, "chatml")

trainer = PantheraMLTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=rows,
    args=PantheraMLTrainingArguments(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        packing=True,  # several conversations in one row of max_seq_length, without seeing one another
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        logging_steps=5,
        save_strategy="no",
    ),
)
# Questions are read, not learned. The log shows one row with what is trained on between marks.
trainer = train_on_responses_only(trainer)
trainer.train()
model.save_pretrained(options.output / "adapter", tokenizer)
