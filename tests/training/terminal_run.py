"""A short run with progress bars and figures of GPUs that are not there; a test reads what it writes."""

import sys

from datasets import Dataset

from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments
from pantheraml.training import telemetry

ROW = {"allocated": 39.72, "reserved": 41.0, "peak_allocated": 40.1, "total": 139.8, "free": 66.0, "power": 690.4,
       "temperature": 61.0}  # fmt: skip
telemetry.device_stats = lambda: {"gpu_0": ROW, "gpu_1": ROW | {"used_by_others": 31.2}}

model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=64, load_in_4bit=False)
PantheraMLDistributedTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(12)]}),
    args=PantheraMLTrainingArguments(
        output_dir=sys.argv[2], per_device_train_batch_size=2, max_steps=6, logging_steps=2, save_strategy="no",
        report_to="none",
    ),
).train()  # fmt: skip
