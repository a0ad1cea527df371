"""DeepSpeed's ZeRO on every GPU, in the order of a script that makes its arguments first.

    python examples/deepspeed_multi_gpu.py
    accelerate launch --config_file examples/ds_config.yaml --num_processes 4 examples/deepspeed_multi_gpu.py
    torchrun --nproc_per_node=4 examples/deepspeed_multi_gpu.py --zero-stage 3

pip install "pantheraml[deepspeed]" first. Under accelerate launch its file says the stage; else --zero-stage does.
Without --model a small random Llama is built here. One process trains without DeepSpeed.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from pantheraml import (
    FastLanguageModel,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    barrier,
    initialize_distributed,
)
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file; docs/data-formats.md lists the formats that are recognised")
parser.add_argument("--output", type=Path, default=Path("outputs/deepspeed"))
parser.add_argument("--max-steps", type=int, default=30)
parser.add_argument("--zero-stage", type=int, choices=range(4), help="without accelerate's file; 2 is usual")
options = parser.parse_args()

args = PantheraMLTrainingArguments(
    output_dir=str(options.output / "run"),
    per_device_train_batch_size=2,  # this and the next two are in ds_config.yaml, too
    gradient_accumulation_steps=2,
    max_grad_norm=1.0,
    max_steps=options.max_steps,
    warmup_steps=5,
    learning_rate=2e-4,
    logging_steps=5,
    save_strategy="no",
    multi_gpu_strategy="deepspeed",
)
accelerator = initialize_distributed(strategy="deepspeed", zero_stage=options.zero_stage, args=args)

rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    if accelerator.is_main_process:
        build_base_model(Path(options.model), map(str, rows))
    barrier()  # the others wait for it

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)

trainer = PantheraMLDistributedTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
trainer.train()
model.save_pretrained(
    options.output / "adapter", tokenizer
)  # on every rank: at stage 3 each has a part of it
