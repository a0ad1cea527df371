"""GRPO with a reward that a program verifies: a model learns to add by trying, and its reward rises.

    python examples/grpo_arithmetic.py
    python examples/grpo_arithmetic.py --num-gpus 2
    python examples/grpo_arithmetic.py --model Qwen/Qwen2.5-0.5B-Instruct --largest 99 --learning-rate 1e-5

Without --model a random Llama of 16 tokens is built here and trained in full: its reward rises from 0.1 to 0.9 within a
minute on two CPU cores. A model that is named gets an adapter. Several ranks train as one does, with fewer rows each.
"""

import argparse
import itertools
import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import pantheraml
from pantheraml import FastLanguageModel, barrier, get_world_size, is_bfloat16_supported, is_main_process
from pantheraml.training.rewards import get_reward_funcs

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--largest", type=int, default=4, help="numbers are 0 to this one")
parser.add_argument("--output", type=Path, default=Path("outputs/grpo-arithmetic"))
parser.add_argument("--max-steps", type=int, default=150)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--num-gpus", type=int, help="by default all; without GPUs, so many ranks on the CPU")
options = parser.parse_args()

pantheraml.enable_grpo_support()
pantheraml.enable_multi_gpu(num_gpus=options.num_gpus)  # plain python becomes several ranks here


def build_calculator(folder):
    """A random Llama that knows digits, a plus and an equals sign."""
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "?", *"0123456789+="])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?")
    PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    torch.manual_seed(3407)
    LlamaForCausalLM(config).save_pretrained(folder)


is_small, name = options.model is None, options.model or str(options.output / "base-model")
if is_small and is_main_process():
    build_calculator(Path(name))
barrier()  # the other ranks wait for it
model, tokenizer = FastLanguageModel.from_pretrained(
    name, max_seq_length=128, load_in_4bit=False, full_finetuning=is_small
)
if not is_small:
    model = FastLanguageModel.get_peft_model(model, r=16)

numbers = range(options.largest + 1)
rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in itertools.product(numbers, numbers)]
random.Random(3407).shuffle(rows)
if tokenizer.chat_template:
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
args = GRPOConfig(
    output_dir=str(options.output / "run"), max_steps=options.max_steps, learning_rate=options.learning_rate,
    num_generations=8, per_device_train_batch_size=128 // get_world_size(),  # 16 prompts a step, of all ranks
    max_completion_length=2 if is_small else 16, bf16=is_bfloat16_supported(), logging_steps=1,
    save_strategy="no", report_to="none",
)  # fmt: skip
rewards = get_reward_funcs(["accuracy"])  # compares with the column "answer"
trainer = GRPOTrainer(model, rewards, args, Dataset.from_list(rows), processing_class=tokenizer)
trainer.train()

found = [line["reward"] for line in trainer.state.log_history if "reward" in line]
for part in (found[start : start + 10] for start in range(0, len(found), 10)) if is_main_process() else ():
    print(f"reward {sum(part) / len(part):.2f} {'#' * round(40 * sum(part) / len(part))}")
model.save_pretrained(options.output / "model", tokenizer)
