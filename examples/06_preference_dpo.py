"""DPO: from pairs of a better and a worse answer, with TRL's DPOTrainer.

    python examples/06_preference_dpo.py
    python examples/06_preference_dpo.py --model outputs/chat/adapter --data pairs.jsonl

--data is a JSONL file with the columns prompt, chosen and rejected (texts or lists of messages). DPO shifts a model
from one kind of answer to another; what answers at all (04_chat_data.py) makes a better start than a base model.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from pantheraml import FastLanguageModel, get_chat_template, is_bfloat16_supported
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file with the columns prompt, chosen and rejected")
parser.add_argument("--output", type=Path, default=Path("outputs/dpo"))
parser.add_argument("--max-steps", type=int, default=30)
options = parser.parse_args()

debug = load_debug_dataset()


def as_pair(row):
    """The plain answer is preferred to one wrapped in phrases."""
    wordy = f"What a good question! {row['output']} I hope that this helps."
    return {
        "prompt": [{"role": "user", "content": f"{row['instruction']} {row['input'] or ''}".strip()}],
        "chosen": [{"role": "assistant", "content": row["output"]}],
        "rejected": [{"role": "assistant", "content": wordy}],
    }


if options.data:
    pairs = load_dataset("json", data_files=options.data, split="train")
else:
    pairs = debug.map(as_pair, remove_columns=debug.column_names)
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, debug))

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=False)
if tokenizer.chat_template is None:
    tokenizer = get_chat_template(tokenizer, "chatml")
if not isinstance(model, PeftModel):  # a saved adapter comes back as one, ready to be trained further
    model = FastLanguageModel.get_peft_model(model, r=16)

# The reference that DPO compares with is the same model with a frozen copy of the adapter: no second model is loaded.
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        beta=0.1,  # how much each step away from the reference costs
        max_length=512,
        bf16=is_bfloat16_supported(),
        use_cpu=not torch.cuda.is_available(),  # TRL's configurations assume a GPU
        logging_steps=5,
        save_strategy="no",
    ),
    train_dataset=pairs,
    processing_class=tokenizer,
)
trainer.train()

model.delete_adapter("ref")  # TRL's frozen copy has served
model.save_pretrained(options.output / "adapter", tokenizer)
