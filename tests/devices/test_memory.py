"""Memory statistics and the guide's GPU helpers, without a GPU."""

from __future__ import annotations

import psutil
import pytest
import torch

from pantheraml.devices.memory import format_memory_stats, get_memory_stats
from pantheraml.errors import HardwareError
from pantheraml.kernels import utils

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@no_gpu
def test_cpu_statistics_follow_what_is_held():
    before = get_memory_stats()["cpu"]
    held = torch.ones(64 * 1024 * 1024)  # 0.25 GiB of float32, touched
    after = get_memory_stats()["cpu"]
    del held
    freed = get_memory_stats()["cpu"]
    assert after["rss"] - before["rss"] == pytest.approx(0.25, abs=0.05)
    assert freed["rss"] < after["rss"] - 0.2
    assert freed["peak_rss"] >= after["rss"] - 0.01
    assert after["total"] == pytest.approx(psutil.virtual_memory().total / 1024**3)


@pytest.mark.promise("A11")
def test_the_table_has_a_line_per_device_and_aligned_columns():
    table = format_memory_stats(
        {"gpu_0": {"allocated": 1.5, "free": 100.25}, "cpu": {"rss": 0.125}},
    )
    assert table.splitlines() == [
        "GiB    allocated    free   rss",
        "gpu_0       1.50  100.25     -",
        "cpu            -       -  0.12",
    ]


@pytest.mark.promise("A12")
@no_gpu
def test_gpu_helpers_without_a_gpu():
    assert utils.get_current_gpu_index() is None
    utils.clear_gpu_cache()
    for ask in (
        lambda: utils.set_gpu_device(0),
        utils.get_gpu_memory_info,
        lambda: utils.get_gpu_memory_info(1),
    ):
        with pytest.raises(HardwareError, match="sees no GPU"):
            ask()
