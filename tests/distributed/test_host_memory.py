"""Ranks of a machine that load one checkpoint hold it once: its pages are shared, and stay so while adapters train."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from datasets import Dataset

from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments
from tests import tiny
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
SIZES = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16)


def shares(name, of=""):
    """MiB of this process, or of its mapping of one file, under a name of /proc; a page of N processes counts 1/N."""
    found, is_meant = 0, not of
    for line in Path("/proc/self/smaps" if of else "/proc/self/smaps_rollup").read_text().splitlines():
        if "-" in line.split()[0]:  # the line of a mapping
            is_meant = line.endswith(of)
        elif is_meant and line.startswith(f"{name}:"):
            found += int(line.split()[1])
    return found / 1024


def train(folder):
    """MiB that this rank holds for itself beside what it held before, and its share of the checkpoint's pages."""
    import torch.distributed as dist

    dist.barrier()
    before = shares("Pss_Anon")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=16, load_in_4bit=False, dtype="float32"
    )
    model = FastLanguageModel.get_peft_model(model, r=2)
    args = PantheraMLTrainingArguments(
        output_dir=str(folder / "run"), max_steps=1, per_device_train_batch_size=1, bf16=False, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"text": "one two three"}] * 4)
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, tokenizer=tokenizer
    )
    trainer.evaluate()  # before training, accelerate prepares the model for that alone
    trainer.train()
    dist.barrier()
    found = shares("Pss_Anon") - before, shares("Pss", of="/model/model.safetensors")
    dist.barrier()  # the share of a process that has ended falls to the others
    return found


@pytest.mark.promise("D2")
def test_ranks_hold_one_copy_of_a_checkpoint(tmp_path):
    size = (tiny.save_checkpoint(tmp_path / "model", **SIZES) / "model.safetensors").stat().st_size / 2**20
    found = run_ranks(2, train, tmp_path)
    assert all(private < 0.5 * size for private, _ in found)
    assert sum(pages for _, pages in found) == pytest.approx(size, rel=0.05)
