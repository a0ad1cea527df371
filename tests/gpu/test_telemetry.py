"""Figures of a run on a GPU, what they cost, and its memory as predicted."""

from __future__ import annotations

import gc
import json
import logging
import time

import pytest
import torch

from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer
from pantheraml.models.memory_estimate import weight_bytes
from tests import tiny
from tests.gpu.test_training import ROWS, arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    "settings", [dict(load_in_16bit=True), dict(load_in_4bit=True)], ids=["bf16", "4bit"]
)
def test_a_run_predicts_measures_and_tells(tmp_path, caplog, settings):
    folder = tiny.save_checkpoint(
        tmp_path / "base",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
    )
    # Once before: the thread that tries attention beside loading gets 32 MiB of cuBLAS' for good.
    FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, **settings)
    gc.collect()
    before = torch.cuda.memory_allocated()
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, **settings)
    held = torch.cuda.memory_allocated() - before
    assert weight_bytes(model) == pytest.approx(held, rel=0.1)
    model = FastLanguageModel.get_peft_model(model, r=4)
    trainer = PantheraMLDistributedTrainer(
        model, arguments(tmp_path / "run"), train_dataset=ROWS, tokenizer=tokenizer
    )
    with caplog.at_level(logging.INFO, logger="pantheraml"):
        trainer.train()
    (predicted,) = (line for line in caplog.messages if line.startswith("predicted memory of each device"))
    (compared,) = (line for line in caplog.messages if line.startswith("memory: predicted"))
    assert (
        torch.cuda.get_device_name() in " ".join(caplog.messages)
        and "measured" in compared
        and " of " in predicted
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "telemetry.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    row = lines[-1]["devices"]["gpu_0"]
    assert row["peak_allocated"] * 2**30 >= held and row["reserved"] >= row["allocated"]
    assert row["used_by_all"] >= row["reserved"] and row["used_by_others"] >= 0
    began = time.perf_counter()
    for step in range(20):
        trainer.figures(0, {"loss": float(step)})
    assert (time.perf_counter() - began) / 20 < 0.01, "seconds of a logging step's figures"
