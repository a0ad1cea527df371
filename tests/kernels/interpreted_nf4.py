"""The kernel that unpacks 4-bit weights under Triton's interpreter; run by ``test_formats_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import nf4
from tests.kernels.nf4_cases import SHAPES, packed, spread, theirs


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
