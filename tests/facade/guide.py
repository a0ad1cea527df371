"""The calls of a guide to several GPUs, one after another as in one session; a tiny model and rows stand in.

    python guide.py MODEL ROWS OUTPUT

Without a GPU, SFTConfig's own bf16 is off.
"""

import json
import os
import sys
from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig

import pantheraml
from pantheraml import FastLanguageModel, MultiGPUConfig, PantheraMLDistributedTrainer
from pantheraml.errors import HardwareError

base, rows, output = sys.argv[1:]
common = dict(output_dir=output, logging_steps=1, max_steps=2, bf16=False)
steps = []


def train(trainer):
    trainer.train()
    last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps.append(len(last))
    assert all(loss > 0 for loss in last)


# The quick start: 4 bits, no get_peft_model, columns of instructions that are recognised.
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=base, max_seq_length=2048, dtype=None, load_in_4bit=True, use_multi_gpu=True, auto_device_map=True
)  # fmt: skip
assert FastLanguageModel.for_training(model) is model
data = {
    "model": model,
    "tokenizer": tokenizer,
    "train_dataset": load_dataset("json", data_files=rows, split="train"),
}
args = SFTConfig(
    per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, learning_rate=2e-4, **common
)
train(PantheraMLDistributedTrainer(**data, args=args))

# Every field of the settings, and a second trainer of the same model.
config = MultiGPUConfig(
    backend="nccl", timeout_minutes=30, auto_device_map=True, tensor_parallel=False, pipeline_parallel=False,
    use_gradient_checkpointing=True, find_unused_parameters=False,
)  # fmt: skip
train(PantheraMLDistributedTrainer(**data, args=args, multi_gpu_config=config))

# Names of device maps, which mean the one device of a rank that there is here.
for name in ("auto", "balanced", "sequential"):
    FastLanguageModel.from_pretrained(model_name=base, device_map=name, use_multi_gpu=True)

# Against a full memory, and against slow steps.
args = SFTConfig(
    per_device_train_batch_size=1, gradient_accumulation_steps=8, gradient_checkpointing=True, **common
)
train(
    pantheraml.UnslothDistributedTrainer(
        **data, args=args, multi_gpu_config=MultiGPUConfig(use_gradient_checkpointing=True)
    )
)
args = SFTConfig(
    per_device_train_batch_size=4, dataloader_num_workers=2, dataloader_pin_memory=True, **common
)
trainer = pantheraml.UnslothDistributedTrainer(**data, args=args)
train(trainer)

# What it holds.
trainer.print_memory_stats()
memory = trainer.get_model_memory_usage()

# By hand.
assert pantheraml.setup_multi_gpu(MultiGPUConfig()) == MultiGPUConfig()
facts = {
    "available": pantheraml.is_distributed_available(), "world": pantheraml.get_world_size(),
    "rank": pantheraml.get_rank(), "main": pantheraml.is_main_process(), "steps": steps, "memory": sorted(memory),
}  # fmt: skip
pantheraml.cleanup_multi_gpu()
with pantheraml.distributed_context(MultiGPUConfig()) as config:
    facts["again"] = pantheraml.is_distributed_available()
assert not pantheraml.is_distributed_available()

# Devices by number.
from pantheraml.kernels.utils import (  # noqa: E402
    clear_gpu_cache,
    get_current_gpu_index,
    get_gpu_memory_info,
    set_gpu_device,
)

clear_gpu_cache()
for ask in (get_current_gpu_index, lambda: set_gpu_device(1), lambda: get_gpu_memory_info(0)):
    try:
        ask()
    except HardwareError as error:
        assert "sees no GPU" in str(error)
Path(output, f"facts_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))
