"""Which GPUs are visible and how much of them is free, by a stand-in of the driver."""

from __future__ import annotations

import pytest
import torch

from pantheraml.devices import visible_gpus
from pantheraml.devices.nvml import Gpu, GPUState
from pantheraml.devices.visible_gpus import select_visible, visible_memory

GIB = 2**30
WHOLE = [Gpu(f"GPU-{letter}0000000-aaaa", False) for letter in "0123"]


class Driver:
    """NVML with GPUs of which 8, 16, ... GiB (or ``total`` each) are there and 1, 2, ... GiB are taken."""

    def __init__(self, gpus=WHOLE, total=None):
        self._gpus, self._total = gpus, total

    def gpus(self):
        return self._gpus

    def state(self, uuid):
        index = [gpu.uuid for gpu in self._gpus].index(uuid)
        return GPUState(index + 1.0, self._total or 8.0 * (index + 1), None, None, {})


@pytest.fixture
def torch_tells(monkeypatch):
    """torch sees two GPUs."""
    monkeypatch.setattr("pantheraml.devices.inventory.num_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 + index, 200 + index))


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (None, "0123"),
        ("", ""),
        ("-1", ""),
        ("2", "2"),
        (" 3, 0 ", "30"),
        ("0,7,1", "0"),
        ("0,-1,1", "0"),
        ("1x,+2", "12"),
        ("0,1,0", ""),
        ("GPU-2,GPU-0", "20"),
        ("GPU-2,GPU-2", ""),
        ("GPU-2,0", "2"),
        ("GPU-", ""),
    ],
)
def test_the_variable_is_read_as_cuda_reads_it(selection, names):
    assert select_visible(WHOLE, selection) == [WHOLE[int(name)] for name in names]


def test_slices_are_not_told():
    assert select_visible(WHOLE, "MIG-1,MIG-2") is None


def test_free_and_total_bytes_in_the_order_of_cuda():
    driver = Driver(total=8.5)
    assert visible_memory("free", {}, driver) == {i: int((7.5 - i) * GIB) for i in range(4)}
    assert visible_memory("total", {}, driver) == dict.fromkeys(range(4), 17 * GIB // 2)
    assert visible_memory("free", {"CUDA_VISIBLE_DEVICES": "3,1"}, driver) == {
        0: int(4.5 * GIB),
        1: int(6.5 * GIB),
    }
    assert visible_memory("free", {"CUDA_VISIBLE_DEVICES": ""}, driver) == {}


def test_unlike_gpus_are_in_nvmls_order_if_cuda_is_told_so(torch_tells):
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
    assert visible_memory("free", order, Driver()) == {0: 14 * GIB}
    assert visible_memory("free", {}, Driver()) == {0: 100, 1: 101}


def test_where_nvml_cannot_tell_torch_does(monkeypatch, torch_tells):
    split = [gpu._replace(is_split=True) for gpu in WHOLE]
    assert visible_memory("free", {}, Driver(split, total=8.0)) == {0: 100, 1: 101}
    assert visible_memory("free", {"CUDA_VISIBLE_DEVICES": "MIG-1"}, Driver(total=8.0)) == {0: 100, 1: 101}
    silent = Driver(total=8.0)
    silent.state = lambda uuid: None
    assert visible_memory("free", {}, silent) == {0: 100, 1: 101}
    monkeypatch.setattr(visible_gpus, "open_nvml", lambda: None)
    assert visible_memory("total", {}) == {0: 200, 1: 201}
    monkeypatch.setattr("pantheraml.devices.inventory.num_gpus", lambda: 0)
    assert visible_memory() == {}
