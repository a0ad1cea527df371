"""A reward model: a score for an answer, learned from pairs, with TRL's RewardTrainer.

    python examples/08_reward_model.py
    python examples/08_reward_model.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --max-steps 200

--data is a JSONL file with the columns chosen and rejected, perhaps prompt (texts or lists of messages).
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from trl import RewardConfig, RewardTrainer

from pantheraml import FastLanguageModel, get_chat_template, is_bfloat16_supported
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a JSONL file with the columns chosen and rejected")
parser.add_argument("--output", type=Path, default=Path("outputs/reward"))
parser.add_argument("--max-steps", type=int, default=30)
options = parser.parse_args()

debug = load_debug_dataset()


def as_pair(row):
    """The plain answer is preferred to one wrapped in phrases."""
    question = {"role": "user", "content": f"{row['instruction']} {row['input'] or ''}".strip()}
    wordy = f"What a good question! {row['output']} I hope that this helps."
    answers = {"chosen": row["output"], "rejected": wordy}
    return {kind: [question, {"role": "assistant", "content": text}] for kind, text in answers.items()}


if options.data:
    pairs = load_dataset("json", data_files=options.data, split="train")
else:
    pairs = debug.map(as_pair, remove_columns=debug.column_names)
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), map(str, debug))

# num_labels=1 puts one new row of weights in place of the head: the score. It is trained in full beside the adapter.
model, tokenizer = FastLanguageModel.from_pretrained(
    options.model, max_seq_length=512, load_in_4bit=False, num_labels=1
)
if tokenizer.chat_template is None:
    tokenizer = get_chat_template(tokenizer, "chatml")
model = FastLanguageModel.get_peft_model(model, r=16)

trainer = RewardTrainer(
    model=model,
    args=RewardConfig(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        max_length=512,
        bf16=is_bfloat16_supported(),
        use_cpu=not torch.cuda.is_available(),  # TRL's configurations assume a GPU
        logging_steps=5,
        save_strategy="no",
    ),
    train_dataset=pairs,
    processing_class=tokenizer,
)
trainer.train()
folder = str(options.output / "merged")
model.save_pretrained_merged(folder, tokenizer)

# The folder says that it holds a reward model, so num_labels need not be given again.
model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=512, load_in_4bit=False)
for answer in ("Paris.", "What a good question! Paris. I hope that this helps."):
    chat = [{"role": "user", "content": "The capital of France?"}, {"role": "assistant", "content": answer}]
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True).to(model.device)
    with torch.no_grad():
        print(f"score {model(**inputs).logits.item():+.2f}: {answer}")
