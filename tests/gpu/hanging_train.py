"""A training run on two GPUs of which rank 1 sleeps in step 4: python hanging_train.py MODEL OUTPUT WHERE"""

import os
import sys
import time
from pathlib import Path

from datasets import Dataset

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    get_rank,
)

model_folder, output, where = sys.argv[1:4]
config = MultiGPUConfig(num_processes=2, hang_seconds=3 if where == "nowhere" else 10)
rows = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(256)]})
model, tokenizer = FastLanguageModel.from_pretrained(
    model_folder, max_seq_length=64, load_in_4bit=False, use_multi_gpu=config
)
Path(output, f"pid{get_rank()}").write_text(str(os.getpid()))
args = PantheraMLTrainingArguments(
    output_dir=output, per_device_train_batch_size=4, max_steps=30, logging_steps=10, report_to="none",
    disable_tqdm=True, save_strategy="no",
)  # fmt: skip
trainer = PantheraMLDistributedTrainer(
    model, args, train_dataset=rows, tokenizer=tokenizer, multi_gpu_config=config
)


def sleeps():
    if get_rank() == 1 and trainer.state.global_step == 3 and where != "nowhere":
        Path(output, "slept").write_text(str(time.time()))
        time.sleep(10_000)


def before(original):
    def late(*arguments, **more):
        sleeps()
        return original(*arguments, **more)

    return late


name = {"loader": "get_batch_samples"}.get(where, "training_step")
setattr(trainer, name, before(getattr(trainer, name)))
trainer.train()
