"""Continued pretraining: plain text, LoRA with trained embeddings and head, a lower rate for these.

    python examples/05_continued_pretraining.py
    python examples/05_continued_pretraining.py --model Qwen/Qwen3-0.6B-Base --data book.txt --max-steps 200

--data is a text file, each line a passage. A model learns a new language or field this way: the words themselves
(the embedding) and which of them to say (the head) have to change, so both are trained in full.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.demo.base_model import build_base_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a hub id")
parser.add_argument("--data", help="a text file, each line a passage")
parser.add_argument("--output", type=Path, default=Path("outputs/continued-pretraining"))
parser.add_argument("--max-steps", type=int, default=30)
options = parser.parse_args()

if options.data:
    rows = load_dataset("text", data_files=options.data, split="train").filter(
        lambda row: row["text"].strip()
    )
else:
    sentences = load_debug_dataset()["output"]
    rows = Dataset.from_dict(
        {"text": [" ".join(sentences[at : at + 10]) for at in range(0, len(sentences), 10)]}
    )
if options.model is None:
    options.model = str(options.output / "base-model")
    build_base_model(Path(options.model), rows["text"])

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(
    model,
    r=64,  # more is to be learned than a manner of answering
    lora_alpha=64,
    use_rslora=True,  # keeps the scale of large ranks steady
    target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head",
    ],
)  # fmt: skip

trainer = PantheraMLTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=rows,
    args=PantheraMLTrainingArguments(
        output_dir=str(options.output / "run"),
        max_steps=options.max_steps,
        packing=True,
        per_device_train_batch_size=2,
        learning_rate=5e-5,
        embedding_learning_rate=1e-5,  # every row uses these weights, so they move more carefully
        logging_steps=5,
        save_strategy="no",
    ),
)
trainer.train()
model.save_pretrained_merged(options.output / "merged", tokenizer, save_method="merged_16bit")
