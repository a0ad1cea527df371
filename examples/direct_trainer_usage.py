"""A model, an optimizer and a data loader of one's own, on every GPU: MultiGPUTrainer.

    python examples/direct_trainer_usage.py
    python examples/direct_trainer_usage.py --num-gpus 2
    torchrun --nproc_per_node=4 examples/direct_trainer_usage.py

Any torch module will do; this one is a language model with LoRA. Each batch is shared out between the GPUs, and weighed
by tokens its gradient is that of one process, however many there are. Without --model a small random Llama is built.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader

from pantheraml import (
    AggregationMethod,
    FastLanguageModel,
    MultiGPUConfig,
    MultiGPUTrainer,
    barrier,
    is_main_process,
    setup_multi_gpu,
)
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file with the columns instruction and output")
parser.add_argument("--output", type=Path, default=Path("outputs/direct"))
parser.add_argument("--max-steps", type=int, default=10, help="of each of the two epochs")
parser.add_argument("--num-gpus", type=int, help="by default all that are visible")
options = parser.parse_args()

# The trainer would start the ranks, too; before the model is loaded is sooner.
setup_multi_gpu(MultiGPUConfig(num_processes=options.num_gpus))
rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    if is_main_process():
        build_base_model(Path(options.model), map(str, rows))
    barrier()  # the others wait for it

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)


def collate(texts):
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


texts = [f"{row['instruction']}\n{row['output']}{tokenizer.eos_token}" for row in rows]
texts = texts[: 8 * options.max_steps - 4]  # the last batch is a short one
loader = DataLoader(texts, batch_size=8, shuffle=True, collate_fn=collate)

trainer = MultiGPUTrainer(
    model=model,
    num_gpus=options.num_gpus,
    optimizer_config={"class": torch.optim.AdamW, "kwargs": {"lr": 1e-3, "weight_decay": 0.01}},
    aggregation_method=AggregationMethod.WEIGHTED,
)
trainer.setup()
for _ in range(2):
    stats = trainer.train_epoch(loader)
    if is_main_process():
        print(json.dumps(stats))
trainer.model.save_pretrained(options.output / "adapter", tokenizer)  # rank 0 writes, the others go on
trainer.cleanup()
