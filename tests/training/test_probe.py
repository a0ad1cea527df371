"""The probe of a plan: real steps, and a plan that counts with what they measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pantheraml.devices.known_gpus import read_gpus
from pantheraml.devices.peak_memory import MemoryEstimate
from pantheraml.devices.plan import PlanRequest, choose_plan
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.models.loading import load_config
from pantheraml.models.optimal_config import parts_of
from pantheraml.training import probe as probing
from pantheraml.training.probe import Probe, probe, train_two_steps
from tests.devices.sizes import llama


@pytest.fixture(scope="module")
def planned(llama_folder):
    return PlanRequest(parts_of(load_config(llama_folder), "lora"), read_gpus("H200"), 48, rows=2)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    from tests import tiny

    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize(("method", "recompute", "layers"), [("lora", True, 2), ("full", False, 0)])
def test_two_steps_are_trained_as_planned(planned, llama_folder, method, recompute, layers, caplog):
    caplog.set_level("INFO", "pantheraml")
    done = train_two_steps(str(llama_folder), method, 4, replace(planned, recompute=recompute), 2)
    assert (done.recomputing, done.peak is None) == (layers, not torch.cuda.is_available())
    assert "4 rows; 2 x 1 x 1 = 2 rows a step" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="peaks can be measured here")
def test_without_a_gpu_nothing_is_measured(planned, llama_folder):
    with pytest.raises(HardwareError, match="Peaks are measured on GPUs alone"):
        probe(str(llama_folder), "lora", 4, planned, choose_plan(planned).plan)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of so many bytes, on which steps had a peak of twice what was estimated."""

    def has(size, peak=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (size, size))
        monkeypatch.setattr(probing, "train_two_steps", lambda *_: probing._Steps(0, peak))

    return has


def test_what_is_compared_is_what_ran(gpu, planned):
    gpu(2**37, peak=2**30)
    found = probe("model", "lora", 16, planned, choose_plan(planned).plan)
    assert (found.gpu, found.rows, found.seq, found.recomputing) == ("NVIDIA H200", 2, 48, 0)
    assert found.estimated == choose_plan(planned).plan.memory[0]
    assert found.ratio == 2**30 / found.estimated.total
    assert "2 steps of 2 x 48 tokens on one NVIDIA H200, no layers recomputing: 1.00 GiB" in found.describe()


def test_a_model_that_one_gpu_does_not_hold_is_not_probed(gpu, planned):
    gpu(2**28)
    with pytest.raises(ConfigError, match="does not train 'model' by itself"):
        probe("model", "lora", 16, planned, choose_plan(planned).plan)


def test_the_plan_counts_with_what_was_measured():
    request = PlanRequest(llama(), read_gpus("4x80GB"), 2048)
    before, estimated = choose_plan(request), MemoryEstimate(100, 0, 0, 0)
    assert before.plan.layout.strategy == "ddp"
    for measured, strategy in ((110, "ddp"), (450, "fsdp")):
        ratio = Probe("GPU", 1, 2048, 0, estimated, measured).ratio
        again = choose_plan(replace(request, measured=ratio))
        assert again.plan.layout.strategy == strategy
        assert again.plan.fullest.reserved * ratio <= before.limit
