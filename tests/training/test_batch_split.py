"""Ranks whose devices differ take different shares of a step's rows; the numbers of the training stay."""

from __future__ import annotations

import math

import pytest
import torch

from pantheraml import MultiGPUConfig
from pantheraml.devices.speed import products_per_second
from pantheraml.errors import ConfigError
from pantheraml.training import batch_split
from pantheraml.training.global_batch import GlobalBatch

CPU = torch.device("cpu")


@pytest.mark.promise("B9")
@pytest.mark.parametrize("shares", [(0.75, 0.25), (0.0, 1.0), (0.5, 0.3, 0.2), (0.1, 0.1, 0.1, 0.7)])
@pytest.mark.parametrize(("rows", "per_device"), [(1, 1), (12, 2), (13, 3), (32, 4)])
def test_rows_are_cut_by_shares(shares, rows, per_device):
    batch = GlobalBatch(rows, per_device, len(shares), shares)
    for count in range(1, rows + 1):
        pieces = [batch.cut(range(count), rank) for rank in range(batch.ranks)]
        assert {len(of_rank) for of_rank in pieces} == {batch.turns(count)}, "every rank takes as many"
        taken = [[row for piece in of_rank for row in piece] for of_rank in pieces]
        assert [row for of_rank in taken for row in of_rank] == list(range(count))
        for rank, share in enumerate(shares):
            assert abs(len(taken[rank]) - share * count) <= 1
            most = batch.most(rank)
            assert max(map(len, pieces[rank])) <= most <= math.ceil(per_device * batch.ranks * share) + 1


def test_without_shares_nothing_changes():
    assert GlobalBatch(12, 2, 3).most(1) == 2
    assert not GlobalBatch(8, 4, 2, (0.75, 0.25)).is_even


@pytest.mark.promise("B9")
def test_products_are_counted_by_the_clock():
    """Twice the bytes take about twice the time."""
    single, double = (products_per_second(CPU, dtype, 0.2) for dtype in (torch.float32, torch.float64))
    assert 1e8 < double < 0.9 * single


@pytest.mark.promise("B9")
@pytest.mark.parametrize(
    ("figures", "expected"), [((3.0, 1.0), (0.75, 0.25)), ((1.0, 0.96), None), ((2.0, 2.0), None)]
)
def test_shares_follow_what_is_measured(monkeypatch, figures, expected):
    monkeypatch.setattr(batch_split, "products_per_second", lambda *_: figures[0])
    monkeypatch.setattr(batch_split, "gather_numbers", lambda mine: [mine, [figures[1]]])
    assert batch_split.shares_of_ranks("speed", 2, CPU) == expected


def test_ranks_on_the_cpu_have_one_memory(monkeypatch):
    monkeypatch.setattr(batch_split, "gather_numbers", lambda mine: [mine, mine])
    assert batch_split.shares_of_ranks("memory", 2, CPU) is None


def test_written_shares():
    assert batch_split.shares_of_ranks((2, 1, 1), 3, CPU) == (0.5, 0.25, 0.25)
    assert batch_split.shares_of_ranks((2, 2), 2, CPU) is None
    assert batch_split.shares_of_ranks((2, 1), 1, CPU) is None, "one rank takes all"
    with pytest.raises(ConfigError, match=r"(?s)given to 3 ranks.*Write 3 numbers"):
        batch_split.shares_of_ranks((2, 1), 3, CPU)


@pytest.mark.parametrize("wrong", ["fast", (), (1, -1), (0, 0), (1, True), ("a", "b"), (math.nan, 1), 2])
def test_what_is_no_split(wrong):
    with pytest.raises(ConfigError, match="batch_split"):
        MultiGPUConfig(batch_split=wrong)


def test_ranks_that_share_rows_cannot_split_them():
    with pytest.raises(ConfigError, match=r"(?s)batch_split is a setting of .*'ddp'.*'fsdp'"):
        MultiGPUConfig(batch_split="speed", tensor_parallel=True)
