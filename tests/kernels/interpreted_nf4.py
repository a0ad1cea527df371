"""The kernel that unpacks 4-bit weights under Triton's interpreter; run by ``test_formats_without_gpu.py``."""

from __future__ import annotations

import gc

import pytest
import torch

from pantheraml.kernels import nf4
from pantheraml.kernels.unpack_table import UnpackTable
from tests.kernels.nf4_cases import (
    SHAPES,
    TABLES,
    check_odd_tables,
    check_table,
    packed,
    spread,
    stacks,
    theirs,
)


def unpack(data, state, out=None):
    out = torch.empty(state.shape, dtype=state.dtype) if out is None else out
    nf4.triton_unpack(out, data, *nf4.read_state(state))
    return out


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "blocksize"), SHAPES)
def test_equals_bitsandbytes(shape, blocksize, dtype, nested, kind):
    if shape == (16, 8192) and (kind, nested) != ("nf4", True):
        return
    data, state = packed(shape, dtype, blocksize, kind, nested)
    assert torch.equal(unpack(data, state), theirs(data, state))


@pytest.mark.parametrize("shape", [(33, 40), (7, 11), (6, 10)])
def test_rows_that_lie_apart(shape):
    data, state = packed(shape, torch.float32, 32)
    out, whole = spread(shape, torch.float32)
    assert torch.equal(unpack(data, state, out), theirs(data, state))
    assert (whole[:, shape[1] :] == 77).all()


def test_bfloat16_by_one_unit():
    # the interpreter cuts float32 off where the GPU rounds it to bfloat16
    data, state = packed((64, 64), torch.bfloat16)
    torch.testing.assert_close(unpack(data, state).float(), theirs(data, state).float(), rtol=2**-7, atol=0)


def test_rows_past_2_to_the_31():
    # Rows 2^20 elements apart, so the last one starts past 2^31, in memory that is mostly never touched.
    rows, stride = 2**11 + 2, 2**20
    data, state = packed((rows, 64), torch.float16)
    out = torch.empty(rows * stride, dtype=torch.float16).as_strided((rows, 64), (stride, 1))
    assert torch.equal(unpack(data, state, out), theirs(data, state))


def test_a_wrong_table_is_seen():
    data, state = packed((128, 192), torch.float32)
    expected = theirs(data, state)
    state.code = state.code.roll(1)
    assert not torch.equal(unpack(data, state), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shapes", TABLES)
def test_a_table_equals_bitsandbytes(shapes, dtype, nested, kind):
    assert check_table(shapes, dtype, nested=nested, kind=kind).is_one_launch


@pytest.mark.parametrize(
    ("shapes", "blocksize", "storage"),
    [([(32, 256), (24, 128)], 128, torch.float32), ([(3, 8192), (8, 4096)], 4096, torch.uint8)],
)
def test_a_table_of_other_blocks_and_bytes(shapes, blocksize, storage):
    table = check_table(shapes, torch.float16, margin=0, blocksize=blocksize, storage=storage)
    assert table.is_one_launch


def test_odd_tables_are_written_one_by_one():
    check_odd_tables(torch.float16)


def test_a_table_past_2_to_the_31():
    rows, stride = 2**11 + 2, 2**20
    data, state = packed((rows, 64), torch.float16)
    out = torch.empty(rows * stride, dtype=torch.float16).as_strided((rows, 64), (stride, 1))
    table = UnpackTable([(data, state)], [out])
    table.write()
    assert table.is_one_launch and torch.equal(out, theirs(data, state))


def test_a_table_keeps_what_it_points_to():
    weights = [packed(shape, torch.float32) for shape in TABLES[1]]
    expected = [theirs(*weight) for weight in weights]
    targets, _ = stacks(TABLES[1], torch.float32)
    table = UnpackTable(weights, targets)
    del weights
    gc.collect()
    others = [torch.full((size,), 255, dtype=torch.uint8) for size in (3072, 3456, 12288, 64, 1024) * 8]
    table.write()
    assert others and all(torch.equal(*pair) for pair in zip(targets, expected, strict=True))


def test_a_table_sees_what_changes_inside():
    weights = [packed(shape, torch.float32) for shape in TABLES[1]]
    targets, _ = stacks(TABLES[1], torch.float32)
    table = UnpackTable(weights, targets)
    weights[1][1].code.copy_(weights[1][1].code.roll(1))
    table.write()
    for target, weight in zip(targets, weights, strict=True):
        assert torch.equal(target, nf4.unpack_4bit(*weight))
    assert not torch.equal(targets[1], theirs(*packed(TABLES[1][1], torch.float32)))
