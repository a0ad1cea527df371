"""Dropout by key: the generator's known answers, its statistics, rows of parts, and the plain path."""

from __future__ import annotations

import itertools

import pytest
import torch

from pantheraml.kernels import keyed_dropout as op
from pantheraml.kernels.keyed_dropout import add_dropped, draw_seeds, dropped, kept_values
from tests.kernels.dropout_cases import SEED, SHAPES, SHARES, expected, make


@pytest.mark.parametrize(
    ("word", "seed", "answer"),
    [
        (0, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (0xFFFFFFFF, 2**64 - 1, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    ],
)
def test_the_generator_is_philox(word, seed, answer):
    """Answers of seven rounds that Random123 publishes."""
    counter = [torch.tensor([word])] * 4
    assert [int(found) for found in op.philox(counter, seed)] == answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, p, dtype):
    x, total, whole = make(shape, dtype)
    kept = kept_values(torch.arange(shape[0]), shape[1], p, SEED)
    same = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(dropped(x, p, SEED), expected(x, kept, p), **same)
    want, beside = expected(x, kept, p, total), whole[:, shape[1] :].clone()
    assert add_dropped(total, x, p, SEED) is total
    torch.testing.assert_close(total, want, **same)
    assert torch.equal(whole[:, shape[1] :], beside)


def test_nothing_and_everything():
    x, total, _ = make((40, 300), torch.bfloat16)
    assert torch.equal(dropped(x, 0.0, SEED), x)
    before = total.clone()
    assert not dropped(x, 1.0, SEED).any() and torch.equal(add_dropped(total, x, 1.0, SEED), before)
    assert dropped(x[:0], 0.5, SEED).shape == (0, 300)


def test_parts_have_the_rows_of_the_whole():
    x, _, _ = make((30, 2100), torch.float32)
    whole = dropped(x, 0.2, SEED, first_row=4)
    for start, stop in ((0, 7), (7, 20), (20, 30)):
        assert torch.equal(dropped(x[start:stop], 0.2, SEED, 4 + start), whole[start:stop])
    assert torch.equal(dropped(x, 0.2, SEED, keys=torch.arange(4, 34)), whole)
    # Nor does it matter how wide x is.
    assert torch.equal(dropped(x[:, :300], 0.2, SEED, 4), whole[:, :300])
    inside = x.clone()
    assert dropped(inside, 0.2, SEED, 4, out=inside) is inside and torch.equal(inside, whole)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_p(p):
    kept = kept_values(torch.arange(500), 4096, p, SEED).double()
    sigma = (p * (1 - p)) ** 0.5
    for part, count in ((kept.mean(), kept.numel()), (kept.mean(0), 500), (kept.mean(1), 4096)):
        assert ((part - (1 - p)).abs() <= 5.5 * sigma / count**0.5).all()


def test_rows_columns_and_seeds_are_independent():
    """Correlations of masks that differ in one thing, and the smallest difference there is, are those of chance."""
    rows, cols = 400, 4096
    signs = 2.0 * kept_values(torch.arange(rows), cols, 0.5, SEED) - 1
    others = [2.0 * kept_values(torch.arange(rows), cols, 0.5, SEED ^ bit) - 1 for bit in (1, 2, 2**40)]
    shifted = [(signs[:, :-by], signs[:, by:]) for by in (1, 2, 255, 256, 512, 1024, 2048)]
    shifted += [(signs[:-by], signs[by:]) for by in (1, 2, 64)]
    shifted += list(itertools.pairwise([signs, *others]))
    for left, right in shifted:
        assert abs((left * right).sum()) <= 5 * left.numel() ** 0.5
    # All pairs of rows, and of columns.
    for matrix in (signs, signs.T):
        products = matrix @ matrix.T
        assert products.fill_diagonal_(0).abs().max() <= 6.5 * matrix.shape[1] ** 0.5


def test_seeds_repeat_with_torchs_generator_and_differ_otherwise():
    torch.manual_seed(5)
    first = draw_seeds(3)
    torch.manual_seed(5)
    assert draw_seeds(3) == first and len({*first, *draw_seeds(3)}) == 6
    assert all(seed % 2 and 2**62 < seed < 2**63 for seed in first)


@pytest.mark.parametrize("first", [0, 7, 2048, 2100])
def test_a_part_of_the_columns(first):
    x, _, _ = make((5, 33), torch.float32)
    kept = kept_values(torch.arange(5), first + 33, 0.5, SEED)[:, first:]
    assert torch.equal(dropped(x, 0.5, SEED, first_column=first), expected(x, kept, 0.5))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("keys", [None, torch.arange(9)])
def test_opcheck(keys, add):
    x, total, _ = make((9, 40), torch.float32)
    arguments = (total.clone(), x.clone(), 0.25, SEED, (0, 0), keys, add)
    torch.library.opcheck(torch.ops.pantheraml.keyed_dropout, arguments)
    torch.ops.pantheraml.keyed_dropout(*arguments)
    kept = kept_values(torch.arange(9), 40, 0.25, SEED)
    assert torch.equal(arguments[0], expected(x, kept, 0.25, total if add else None))
