"""Tensors that go to host memory and come back: their values, and the GPU memory they take meanwhile."""

from __future__ import annotations

import pytest
import torch

from pantheraml.models.fused.host_store import HostStore

pytestmark = pytest.mark.gpu

SETS, NUMBERS = 12, 48 * 2**20  # 192 MiB of float32 a set: three pieces of pinned memory


def busy(x, times=40):
    """Something that keeps the GPU busy, so that the host is far ahead of it."""
    for _ in range(times):
        x = x @ x / x.shape[0] ** 0.5
    return x


def walk(store, side):
    """One forward and backward: how far what came back is from what went, and the most memory taken."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = []
    for index in range(SETS):
        kept.append(
            store.put(torch.full((NUMBERS,), float(index), device="cuda"), torch.arange(7, device="cuda"))
        )
        side = busy(side)
    wrong = torch.zeros((), device="cuda")
    for index in reversed(range(SETS)):
        values, small = kept.pop().get()
        wrong += (values != index).sum() + (small != torch.arange(7, device="cuda")).sum()
        del values, small
        side = busy(side)
    return wrong, torch.cuda.max_memory_allocated() - before


def test_what_went_comes_back_and_takes_few_sets_of_memory():
    store, side = (
        HostStore(torch.device("cuda")),
        torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16),
    )
    for _ in range(3):  # the pinned memory is used again
        wrong, peak = walk(store, side)
        assert wrong.item() == 0
        assert peak < 5 * 4 * NUMBERS


def test_sets_that_are_dropped_on_the_way_give_their_memory_back():
    store, side = (
        HostStore(torch.device("cuda")),
        torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16),
    )
    kept = [store.put(torch.full((NUMBERS,), float(index), device="cuda")) for index in range(6)]
    last = kept.pop().get()[0]
    busy(side)
    kept.clear()  # one of them is coming back right now
    others = [torch.full((NUMBERS,), -1.0, device="cuda") for _ in range(6)]
    torch.cuda.synchronize()
    assert (last == 5).all() and all((other == -1).all() for other in others)
    assert len(store._free) == 6 * 3
