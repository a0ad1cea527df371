"""Devices and dtypes; the cases with a GPU are in tests/gpu/test_devices.py."""

from __future__ import annotations

import os

import pytest
import torch

from pantheraml.devices import inventory
from pantheraml.errors import ConfigError, HardwareError

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.mark.promise("A10")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("torch.bfloat16", torch.bfloat16),
        ("BF16", torch.bfloat16),
        (torch.float16, torch.float16),
        (None, torch.float32),
    ],
)
def test_pick_dtype(name, expected):
    assert inventory.pick_dtype(name, CPU) is expected


@pytest.mark.parametrize("wrong", ["bfloat61", torch.int8, torch.float64])
def test_a_wrong_dtype_lists_the_right_ones(wrong):
    with pytest.raises(ConfigError) as error:
        inventory.pick_dtype(wrong, CPU)
    assert "'bf16'" in str(error.value) and repr(wrong) in str(error.value)


def test_a_misspelt_dtype_is_guessed():
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        inventory.pick_dtype("bfloat61", CPU)


@no_gpu
@pytest.mark.parametrize("device_map", [None, "auto", "balanced", "sequential", "cpu", CPU, {"": "cpu"}])
def test_without_a_gpu_everything_automatic_is_the_cpu(device_map):
    before = dict(os.environ)
    assert inventory.resolve_device(device_map) == CPU
    assert dict(os.environ) == before


@no_gpu
@pytest.mark.parametrize("device_map", ["cuda", "cuda:1", 0, {"": 0}, torch.device("cuda", 3)])
def test_without_a_gpu_asking_for_one_says_so(device_map):
    with pytest.raises(HardwareError, match=r"sees no GPU.*device_map='cpu'"):
        inventory.resolve_device(device_map)


@pytest.mark.parametrize("wrong", ["gpu", "cuda:x", "cuda:-1", "mps", True, 1.5, ["cpu"], {}])
def test_a_wrong_device_map_shows_the_forms(wrong):
    with pytest.raises(ConfigError, match=r"device_map=None.*'cuda:1'"):
        inventory.resolve_device(wrong)


def test_a_misspelt_device_map_is_guessed():
    with pytest.raises(ConfigError, match="Did you mean 'balanced'"):
        inventory.resolve_device("balancd")


def test_a_map_of_one_device_is_that_device():
    assert inventory.resolve_device({"model": "cpu", "lm_head": "cpu"}) == CPU


@pytest.mark.parametrize("device_map", [{"model": 0, "lm_head": "cuda:1"}, {"model": 0, "lm_head": "cpu"}])
def test_several_devices_are_no_device(device_map):
    with pytest.raises(ConfigError, match=r"names 2 devices: .*cuda:0.*Write device_map=None"):
        inventory.resolve_device(device_map)


@no_gpu
def test_bfloat16_on_a_cpu():
    # The known line `fp16=not is_bfloat16_supported()` must choose the type that trains on a CPU.
    assert inventory.is_bfloat16_supported() is True
    assert inventory.is_bfloat16_supported(CPU) is True
