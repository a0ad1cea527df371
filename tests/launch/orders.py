"""Imports, arguments and ranks in the order that the command line says, and then a training; prints its figures.

python orders.py MODEL OUTPUT torch transformers trl pantheraml arguments ranks
"""

import json
import os
import sys

base, output, *order = sys.argv[1:]


def import_torch():
    import torch.distributed  # noqa: F401


def import_transformers():
    import transformers

    transformers.set_seed(42)


def import_trl():
    from trl import SFTConfig, SFTTrainer  # noqa: F401


def import_pantheraml():
    from pantheraml import FastLanguageModel, UnslothTrainer  # noqa: F401


def make_arguments():
    from pantheraml import UnslothTrainingArguments

    made["args"] = UnslothTrainingArguments(
        output_dir=output, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, multi_gpu_strategy="ddp",
    )  # fmt: skip


def initialize():
    from pantheraml import initialize_distributed

    made["accelerator"] = initialize_distributed("ddp", args=made.get("args"))


made = {}
steps = dict(
    torch=import_torch, transformers=import_transformers, trl=import_trl, pantheraml=import_pantheraml,
    arguments=make_arguments, ranks=initialize,
)  # fmt: skip
assert sorted(order) == sorted(steps)
for name in order:
    steps[name]()

from datasets import Dataset  # noqa: E402

from pantheraml import FastLanguageModel, UnslothTrainer  # noqa: E402

rows = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(21)]})
model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=64, load_in_4bit=False)
trainer = UnslothTrainer(model=model, tokenizer=tokenizer, args=made["args"], train_dataset=rows)
trainer.train()
logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
found = {
    "figures": [(entry["loss"], entry["grad_norm"]) for entry in logs],
    "is_one_state": vars(made["accelerator"].state) is vars(trainer.accelerator.state),
}
os.write(1, (json.dumps(found) + "\n").encode())
