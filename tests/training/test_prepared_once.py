"""Rank 0 tokenises for longer than a collective may take, the others wait, and read what it wrote."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    get_rank,
    notebook_launch,
)

SECONDS = 6  # a collective may take so long, and rank 0 twice that


def train(folder, rows, output):
    from datasets import load_dataset

    def slow_text(row):
        if row["number"] == 0:
            Path(output, f"rank {get_rank()} formats").touch()
            time.sleep(2 * SECONDS)
        return f"The capital number {row['number']} is {row['number'] * 7}."

    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=64, load_in_4bit=False, use_multi_gpu=True
    )
    trainer = PantheraMLDistributedTrainer(
        model=FastLanguageModel.get_peft_model(model, r=4),
        tokenizer=tokenizer,
        train_dataset=load_dataset("json", data_files=rows, split="train", cache_dir=f"{output}/cache"),
        formatting_func=slow_text,
        args=PantheraMLTrainingArguments(
            output_dir=output, per_device_train_batch_size=2, max_steps=2, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_tokenising_may_take_longer_than_a_collective(llama, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"number": {number}}}\n' for number in range(12)))
    config = MultiGPUConfig(num_processes=2, timeout_minutes=SECONDS / 60)
    losses = notebook_launch(train, str(llama), str(rows), str(tmp_path), config=config)
    assert len(losses) == 2
    assert [file.name for file in tmp_path.glob("rank*")] == ["rank 0 formats"]
