"""GRPO in the manner of Open R1: a model learns to think before it answers, on every GPU.

    python examples/grpo_open_r1_multi_gpu.py
    python examples/grpo_open_r1_multi_gpu.py --config recipe.yaml --model Qwen/Qwen2.5-3B-Instruct --data rows.jsonl
    torchrun --nproc_per_node=2 examples/grpo_open_r1_multi_gpu.py --config examples/configs/grpo_open_r1_config.yaml

Without --config, the settings of that recipe are tried with completions of 32 tokens by transformers instead of vLLM;
without --model on a small random Llama, which learns nothing sensible. --data has the columns problem and solution, or
question and answer.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer

import pantheraml
from pantheraml import FastLanguageModel, barrier, get_chat_template, is_bfloat16_supported, is_main_process
from pantheraml.config.source import read_yaml
from pantheraml.demo.base_model import build_base_model
from pantheraml.training.rewards import get_reward_funcs

RECIPE = Path(__file__).parent / "configs/grpo_open_r1_config.yaml"
SYSTEM = "Think about the problem, then answer: <think> your thoughts </think> <answer> your answer </answer>"

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path, help=f"a recipe such as {RECIPE.name}")
parser.add_argument("--model", help="a folder or a hub id, instead of the recipe's")
parser.add_argument("--data", help="a JSONL file, instead of the recipe's")
parser.add_argument("--output", type=Path, default=Path("outputs/grpo-open-r1"))
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--num-gpus", type=int, help="by default all; without GPUs, so many ranks on the CPU")
options = parser.parse_args()

pantheraml.enable_grpo_support()
pantheraml.enable_multi_gpu(num_gpus=options.num_gpus)  # plain python becomes several ranks here

recipe = read_yaml(options.config or RECIPE).data
if options.config is None:
    recipe.update(use_vllm=False, max_seq_length=512, max_completion_length=32)
    recipe.update(model_name_or_path=None, dataset_name=None)
name, data = options.model or recipe.pop("model_name_or_path"), options.data or recipe.pop("dataset_name")
recipe = {key: value for key, value in recipe.items() if key not in ("model_name_or_path", "dataset_name")}

sums = [{"problem": f"What is {n} plus {n + 3}?", "solution": str(2 * n + 3)} for n in range(64)]
rows = load_dataset("json", data_files=data, split="train") if data else Dataset.from_list(sums)


def as_prompt(row):
    """The problem as a conversation, with its answer in a column of that name, which rewards compare with."""
    problem = next(row[column] for column in ("problem", "question", "instruction") if row.get(column))
    answer = next(row[column] for column in ("solution", "answer", "output") if row.get(column))
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem}]
    return {"prompt": prompt, "answer": answer}


rows = rows.map(as_prompt, remove_columns=rows.column_names)
if name is None:
    name = str(options.output / "base-model")
    if is_main_process():
        build_base_model(Path(name), map(str, rows))
    barrier()  # the other ranks wait for it

loading = {key: recipe.pop(key) for key in ("max_seq_length", "load_in_4bit") if key in recipe}
model, tokenizer = FastLanguageModel.from_pretrained(name, **loading)
if tokenizer.chat_template is None:
    tokenizer = get_chat_template(tokenizer, "chatml")
model = FastLanguageModel.get_peft_model(model, r=recipe.pop("lora_r", 16), use_gradient_checkpointing="auto")
rewards, run = recipe.pop("reward_funcs"), str(options.output / "run")
args = GRPOConfig(output_dir=run, max_steps=options.max_steps, bf16=is_bfloat16_supported(), **recipe)
rewards = get_reward_funcs(rewards, args.max_completion_length)
trainer = GRPOTrainer(model, rewards, args, rows, processing_class=tokenizer)
trainer.train()
model.save_pretrained(options.output / "adapter", tokenizer)
