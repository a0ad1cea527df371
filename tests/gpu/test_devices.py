"""Devices and memory on a machine with a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from pantheraml.devices.inventory import (
    gpu_device,
    is_bfloat16_supported,
    num_gpus,
    pick_dtype,
    resolve_device,
)
from pantheraml.devices.memory import format_memory_stats, get_memory_stats
from pantheraml.errors import HardwareError
from pantheraml.kernels import utils

pytestmark = pytest.mark.gpu


def test_automatic_is_the_current_gpu():
    before = dict(os.environ)
    current = torch.device("cuda", torch.cuda.current_device())
    for device_map in (None, "auto", "balanced", "sequential", "cuda", {"": current.index}, current):
        assert resolve_device(device_map) == current
    assert dict(os.environ) == before


@pytest.mark.promise("A12")
def test_a_missing_gpu_names_those_there_are():
    name = torch.cuda.get_device_name(0)
    for ask in (
        lambda: resolve_device(99),
        lambda: resolve_device("cuda:99"),
        lambda: gpu_device(-1),
        lambda: utils.set_gpu_device(num_gpus()),
        lambda: utils.get_gpu_memory_info(99),
    ):
        with pytest.raises(HardwareError, match=name):
            ask()


@pytest.mark.promise("A10")
def test_dtype_follows_the_gpu():
    ampere = torch.cuda.get_device_capability()[0] >= 8
    assert is_bfloat16_supported() is ampere
    assert pick_dtype(None, torch.device("cuda", 0)) is (torch.bfloat16 if ampere else torch.float16)


@pytest.mark.promise("A11")
def test_memory_follows_what_is_held():
    index = utils.get_current_gpu_index()
    before = get_memory_stats()[f"gpu_{index}"]
    held = torch.empty(256 * 1024**2, dtype=torch.uint8, device="cuda")
    after = get_memory_stats()[f"gpu_{index}"]
    assert after["allocated"] - before["allocated"] == pytest.approx(0.25)
    assert after["reserved"] >= after["allocated"] and after["peak_allocated"] >= after["allocated"]
    assert 0 < after["free"] <= after["total"]
    del held
    utils.clear_gpu_cache()
    assert utils.get_gpu_memory_info()["reserved"] < after["reserved"]
    assert f"gpu_{index}" in format_memory_stats(get_memory_stats())
