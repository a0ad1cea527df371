"""Figures of a run: operations counted by hand, what people, trackers and programs get, a full disk, what they cost."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments
from pantheraml.devices.peaks import peak_tflops
from pantheraml.training import telemetry
from pantheraml.training.telemetry import Telemetry, number_devices, operations_per_token
from tests import tiny
from tests.distributed.ranks import run_ranks

ROW = {"allocated": 39.72, "reserved": 41.0, "peak_allocated": 40.1, "total": 139.8, "free": 98.2, "power": 690.4,
       "temperature": 61.0}  # fmt: skip


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.frozen = nn.Linear(8, 16).requires_grad_(False)
        self.trained = nn.Linear(16, 4)
        self.norm = nn.LayerNorm(4)


def test_layers_of_adapters_count_once():
    model = tiny.build_model("llama")
    numbers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    assert operations_per_token(model) == 6 * numbers
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    factors = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert operations_per_token(adapted) == 4 * numbers + 6 * factors


def test_operations_of_a_step():
    assert operations_per_token(Model()) == 4 * 8 * 16 + 6 * 16 * 4


def test_weights_in_four_bits_count_as_what_they_stand_for():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 128, bias=False, quant_type="nf4").to("cpu")
    layer.weight.requires_grad_(False)
    assert operations_per_token(nn.Sequential(layer)) == 4 * 64 * 128


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.5), ("NVIDIA H20", 148.0), ("NVIDIA L40S", 362.0), ("NVIDIA L4", 121.0),
     ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA GeForce RTX 4090", 165.0), ("Something else", None)],
)  # fmt: skip
def test_peaks_by_name(name, tflops):
    assert peak_tflops(name) == tflops


@pytest.mark.promise("D6")
def test_lines_and_figures(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(telemetry, "show", lambda message, draw: said.append(message))
    monkeypatch.setattr(telemetry, "device_stats", lambda: {"gpu_0": dict(ROW)})
    monkeypatch.setattr(telemetry, "peak_tflops", lambda name: 1e-9)
    found = Telemetry(tmp_path / "run", Model(), torch.device("cpu"))
    found.begin()
    figures = found.measure(5, 1000, {"loss": 2.5})
    again = found.measure(10, 3000, {"loss": 2.0})
    assert figures["peak_allocated_gib"] == 40.1
    rate = again["tokens_per_second"]
    assert again["mfu"] == pytest.approx(rate * operations_per_token(Model()) / 1e3)
    assert said[1].startswith(f"step 10, {rate:,.0f} tokens/s, ")
    assert said[1].endswith("gpu_0 39.7 GiB (reserved 41.0, peak 40.1, free 98.2) 690 W 61 °C")
    lines = [json.loads(line) for line in (tmp_path / "run" / "telemetry.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(5, 2.5), (10, 2.0)]
    assert lines[1]["devices"]["gpu_0"]["power"] == 690.4 and math.isfinite(lines[0]["time"])


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(telemetry, "say_once", said.append)
    (tmp_path / "run").write_text("a file in the place of the folder")
    found = Telemetry(tmp_path / "run", Model(), torch.device("cpu"))
    assert found.measure(1, 10, {})["tokens_per_second"] > 0
    assert "telemetry is not written" in said[0]


@pytest.mark.promise("A11")
def test_devices_of_all_ranks_have_names_of_their_own():
    assert number_devices([{"gpu_0": {"total": 1.0}}]) == {"gpu_0": {"total": 1.0}}
    apart = [{"gpu_0": {"total": 1.0}}, {"gpu_1": {"total": 2.0}}, {"gpu_0": {"total": 3.0}}]
    assert number_devices(apart) == {
        "gpu_0": {"total": 1.0},
        "gpu_1": {"total": 2.0},
        "gpu_2": {"total": 3.0},
    }


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A run of six steps on a GPU that is not there; every second step is logged."""
    asked = []
    monkeypatch.setattr(telemetry, "device_stats", lambda: asked.append(time.time()) or {"gpu_0": dict(ROW)})
    monkeypatch.setattr(telemetry, "peak_tflops", lambda name: 1e-6)

    def run(callbacks=(), **settings):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tiny.save_checkpoint(tmp_path / "model", "llama")), max_seq_length=64, load_in_4bit=False
        )
        args = PantheraMLTrainingArguments(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, max_steps=6, logging_steps=2,
            save_strategy="no", disable_tqdm=True, **settings,
        )  # fmt: skip
        rows = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(12)]})
        PantheraMLDistributedTrainer(
            model, args, train_dataset=rows, tokenizer=tokenizer, callbacks=list(callbacks)
        ).train()
        return asked

    return run


class Heard(TrainerCallback):
    """What a tracker gets, and after which step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def test_trackers_get_the_figures_and_other_steps_measure_nothing(train):
    heard = Heard()
    asked = train([heard], report_to="none")
    lines = [(step, logs) for step, logs in heard.logs if "loss" in logs]
    assert [step for step, _ in lines] == [2, 4, 6] and len(asked) == 3
    for _, logs in lines:
        assert logs["tokens_per_second"] > 0 and logs["mfu"] > 0 and logs["peak_allocated_gib"] == 40.1


def test_tensorboard_shows_them(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file.parent)).Reload()
    for name in ("tokens_per_second", "mfu", "peak_allocated_gib"):
        assert [event.step for event in found.Scalars(f"train/{name}")] == [2, 4, 6]


def cost(folder):
    """Seconds of a logging step's figures."""
    found = Telemetry(folder, Model(), torch.device("cpu"))
    found.measure(0, 0, {})
    began = time.perf_counter()
    for step in range(1, 51):
        found.measure(step, 100.0 * step, {"loss": 2.0})
    return (time.perf_counter() - began) / 50


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_they_cost_little(tmp_path, ranks):
    assert max(run_ranks(ranks, cost, tmp_path)) < 0.02 * ranks
