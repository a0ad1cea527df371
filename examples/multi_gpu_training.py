"""Every GPU trains: the script for one GPU, with one call more.

    python examples/multi_gpu_training.py
    python examples/multi_gpu_training.py --advanced
    torchrun --nproc_per_node=4 examples/multi_gpu_training.py
    accelerate launch --multi_gpu --mixed_precision=bf16 examples/multi_gpu_training.py
    srun --nodes=2 --gpus-per-node=4 python examples/multi_gpu_training.py

Plain python takes all visible GPUs. --advanced shows the settings and what ranks can ask.
Without --model a small random Llama is built here, so nothing is downloaded (and nothing sensible is learned).
Without a GPU one process trains on the CPU; --num-processes 2 starts two ranks there.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from pantheraml import (
    FastLanguageModel,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    barrier,
    get_world_size,
    initialize_distributed,
)
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file; docs/data-formats.md lists the formats that are recognised")
parser.add_argument("--output", type=Path, default=Path("outputs/multi-gpu"))
parser.add_argument("--max-steps", type=int, default=30)
parser.add_argument("--num-processes", type=int, help="ranks on this machine; by default one for each GPU")
parser.add_argument("--strategy", default="ddp", help="ddp, or fsdp where a GPU does not hold the model")
parser.add_argument("--resume", action="store_true", help="go on with the newest checkpoint, if there is one")
parser.add_argument("--advanced", action="store_true", help="show the settings, and what ranks can ask")
options = parser.parse_args()

args = PantheraMLTrainingArguments(
    output_dir=str(options.output / "run"),
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    max_steps=options.max_steps,
    warmup_steps=5,
    learning_rate=2e-4,
    logging_steps=5,
    save_strategy="no",
    multi_gpu_strategy=options.strategy,
)

# Plain python becomes several ranks here. Each of them runs the script from the beginning and comes past this line.
accelerator = initialize_distributed(
    strategy=options.strategy, args=args, num_processes=options.num_processes, timeout_minutes=30
)

rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    if accelerator.is_main_process:
        build_base_model(Path(options.model), map(str, rows))
    barrier()  # the others wait for it

model, tokenizer = FastLanguageModel.from_pretrained(
    options.model, max_seq_length=512, load_in_4bit=False, use_multi_gpu=True, auto_device_map=True
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
FastLanguageModel.for_training(model)

trainer = PantheraMLDistributedTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
trainer.train(resume_from_checkpoint="auto" if options.resume else None)

if options.advanced and accelerator.is_main_process:  # a rank may ask alone
    print(f"{get_world_size()} ranks trained, by {options.strategy}:\n{accelerator.state}")
    trainer.print_memory_stats()
model.save_pretrained(options.output / "adapter", tokenizer)  # rank 0 writes, the others go on
