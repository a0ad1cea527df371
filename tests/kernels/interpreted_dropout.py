"""Dropout's Triton kernel under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import keyed_dropout as op
from pantheraml.kernels.keyed_dropout import add_dropped, dropped, kept_values
from tests.kernels.dropout_cases import SEED, SHAPES, SHARES, expected, make


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """An interpreted program costs the same for one row as for many."""
    monkeypatch.setitem(op._BLOCKS, "BLOCK_M", 16)


@pytest.mark.parametrize(("dtype", "first_row"), [(torch.float32, 2**33 + 7), (torch.float16, 3)])
@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain_pytorch_bit_by_bit(shape, p, dtype, first_row):
    x, total, whole = make(shape, dtype)
    kept = kept_values(torch.arange(first_row, first_row + shape[0]), shape[1], p, SEED)
    assert torch.equal(dropped(x, p, SEED, first_row), expected(x, kept, p))
    want, beside = expected(x, kept, p, total), whole[:, shape[1] :].clone()
    assert torch.equal(add_dropped(total, x, p, SEED, first_row), want)
    assert torch.equal(whole[:, shape[1] :], beside)


def test_rows_with_keys_of_their_own():
    x, total, _ = make((9, 2500), torch.float32)
    keys = torch.tensor([0, 1, 2**31, 2**32, -1, 2**62, 5, 5, 2**40 + 1])
    kept = kept_values(keys, 2500, 0.3, SEED)
    assert torch.equal(dropped(x, 0.3, SEED, keys=keys), expected(x, kept, 0.3))
    want = expected(x, kept, 0.3, total)
    assert torch.equal(add_dropped(total, x, 0.3, SEED, keys=keys), want)
    assert torch.equal(kept[6], kept[7]) and not torch.equal(kept[0], kept[3])


@pytest.mark.parametrize("first", [7, 2048, 2100])
@pytest.mark.parametrize("cols", [33, 2500])
def test_a_part_of_the_columns(first, cols):
    x, _, _ = make((5, cols), torch.float32)
    kept = kept_values(torch.arange(5), first + cols, 0.5, SEED)[:, first:]
    assert torch.equal(dropped(x, 0.5, SEED, first_column=first), expected(x, kept, 0.5))


def test_rows_past_2_to_the_31():
    # Rows 2^26 elements apart, so the last one starts past 2^31, in memory that is mostly never touched.
    rows, stride = 2**5 + 2, 2**26
    x, _, _ = make((rows, 64), torch.float16)
    apart = torch.empty(rows * stride, dtype=torch.float16).as_strided((rows, 64), (stride, 1))
    apart.copy_(x)
    want = dropped(x, 0.4, SEED)
    assert torch.equal(dropped(apart, 0.4, SEED), want)
    assert torch.equal(dropped(x, 0.4, SEED, out=apart), want)


def test_another_number_of_rounds_is_seen(monkeypatch):
    x, _, _ = make((5, 33), torch.float32)
    kept = kept_values(torch.arange(5), 33, 0.5, SEED)
    monkeypatch.setitem(op._BLOCKS, "ROUNDS", 6)
    assert not torch.equal(dropped(x, 0.5, SEED), expected(x, kept, 0.5))
