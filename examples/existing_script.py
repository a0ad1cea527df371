"""A script of TRL's SFTTrainer on every GPU: one import and one call more.

    python examples/existing_script.py
    python examples/existing_script.py --advanced
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node=2 examples/existing_script.py

With --advanced the planner says what enable_multi_gpu is told, for a model of 7 billion weights on GPUs of 32 GB.
Without --model a small random Llama is built here. disable_multi_gpu, at the end, leaves TRL as it was.
"""

import argparse
from pathlib import Path

import pantheraml
from pantheraml.utils import ConfigManager, DeviceManager

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file with the columns instruction and output")
parser.add_argument("--output", type=Path, default=Path("outputs/existing-script"))
parser.add_argument("--max-steps", type=int, default=20)
parser.add_argument("--num-gpus", type=int, help="by default all that are visible")
parser.add_argument("--advanced", action="store_true", help="settings by the planner")
options = parser.parse_args()

# What is new. It comes first: plain python starts a rank for each GPU here, which runs the script from its beginning.
settings = {"batch_size_per_gpu": 4}
if options.advanced:
    print("GPUs:", *DeviceManager().get_available_devices() or ["none"])
    settings = ConfigManager().get_optimal_config(model_size="7B", available_memory="32GB")
pantheraml.enable_multi_gpu(**{**settings, "num_gpus": options.num_gpus})

# From here on nothing knows of several GPUs.
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from pantheraml import FastLanguageModel, barrier, is_bfloat16_supported, is_main_process
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

rows = load_dataset("json", data_files=options.data, split="train") if options.data else load_debug_dataset()
if options.model is None:
    options.model = str(options.output / "base-model")
    if is_main_process():
        build_base_model(Path(options.model), map(str, rows))
    barrier()  # the others wait for it

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=256, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
rows = rows.map(lambda row: {"text": f"{row['instruction']}\n{row['output']}{tokenizer.eos_token}"})

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=rows,
    args=SFTConfig(
        str(options.output / "run"),
        dataset_text_field="text",
        max_steps=options.max_steps,
        learning_rate=2e-4,
        logging_steps=5,
        report_to="none",
        bf16=is_bfloat16_supported(),
        use_cpu=not torch.cuda.is_available(),  # TRL's configurations assume a GPU
    ),
)
trainer.train()
model.save_pretrained(options.output / "adapter", tokenizer)  # rank 0 writes
if is_main_process():
    status = pantheraml.get_multi_gpu_status()
    print(f"Trained on {status['world_size']} ranks, by {', '.join(status['trainers'])}.")
pantheraml.disable_multi_gpu()
