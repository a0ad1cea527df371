"""A model that is larger than a GPU: its layers are split over all of them, and micro-batches follow one another.

    python examples/10_larger_than_a_gpu.py
    python examples/10_larger_than_a_gpu.py --model Qwen/Qwen3-32B --max-memory 0=40GB,1=40GB

One process uses all GPUs, so no launcher is needed. With one GPU, or none, the model stays in one piece.
Without --model a small random Llama is built here, so nothing is downloaded (and nothing sensible is learned).
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file; docs/data-formats.md lists the formats that are recognised")
parser.add_argument("--output", type=Path, default=Path("outputs/split"))
parser.add_argument("--max-steps", type=int, default=20)
parser.add_argument("--device-map", choices=["auto", "balanced", "sequential"], default="balanced")
parser.add_argument(
    "--max-memory", help="what may be taken of each GPU, such as 0=20GB,1=20GB; others are not used"
)
parser.add_argument("--micro-batches", type=int, help="parts of a step; by default four for each GPU")
options = parser.parse_args()

rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, rows))
limits = None
if options.max_memory:
    limits = {
        int(gpu): size for gpu, _, size in (part.partition("=") for part in options.max_memory.split(","))
    }

# Says what goes where, with the predicted peak of each GPU; what cannot fit is refused before anything is loaded.
model, tokenizer = FastLanguageModel.from_pretrained(
    options.model,
    max_seq_length=512,
    load_in_4bit=False,
    device_map=options.device_map,
    max_memory=limits,
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)

trainer = PantheraMLDistributedTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=rows,
    args=PantheraMLTrainingArguments(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # 16 rows a step: the more there are, the less GPUs wait for one another
        learning_rate=2e-4,
        logging_steps=5,
        save_strategy="no",
    ),
    multi_gpu_config=MultiGPUConfig(micro_batches=options.micro_batches) if options.micro_batches else None,
)
trainer.train()
trainer.print_memory_stats()
model.save_pretrained(options.output / "adapter", tokenizer)
