"""What the soak says of memory over time."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from benchmarks.soak import MIB, highest, host_bytes, slope


def test_the_slope_leaves_out_the_first_fifth():
    looks = [{"seconds": 60.0 * at, "host": (500 + 3 * at + 1000 * (at < 4)) * MIB} for at in range(21)]
    assert slope(looks, "host") == pytest.approx(3)


def test_only_the_highest_of_a_minute_tells():
    looks = [
        {"seconds": 10.0 * at, "host": (500 + 2 * (at // 6) - 300 * (at % 6 in (0, 4))) * MIB}
        for at in range(181)
    ]
    assert highest(looks, "host")[3] == (3, 506)
    assert slope(looks[:180], "host") == pytest.approx(2) == slope(looks[:180], "host", 0.5)
    assert len(highest(looks[:7], "host")) == 7, "parts of a short run"


def hold(arrived, leave):
    arrived.set()
    leave.wait()


def test_pages_of_two_processes_count_once():
    context = multiprocessing.get_context("fork")
    block = np.ones(256 * MIB, np.uint8)
    before, arrived, leave = host_bytes(), context.Event(), context.Event()
    child = context.Process(target=hold, args=(arrived, leave))
    child.start()
    try:
        assert arrived.wait(30)
        assert abs(host_bytes() - before) < block.nbytes / 2, "not twice, not nowhere"
    finally:
        leave.set()
        child.join()
