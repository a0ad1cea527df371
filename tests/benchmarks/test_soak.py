"""What the soak says of memory over time."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from benchmarks.soak import MIB, host_bytes, slope


def test_the_slope_leaves_out_the_first_fifth():
    looks = [{"seconds": 60.0 * at, "host": (500 + 3 * at + 1000 * (at < 4)) * MIB} for at in range(21)]
    assert slope(looks, "host") == pytest.approx(3)


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
