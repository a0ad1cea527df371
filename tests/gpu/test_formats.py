"""4-bit weights on a GPU: unpacked bit by bit as bitsandbytes does it."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import nf4
from tests.kernels.nf4_cases import SHAPES, packed, spread, theirs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "blocksize"), [*SHAPES, ((1024, 4096), 64), ((4096, 1792), 128)])
def test_unpacking_equals_bitsandbytes(shape, blocksize, dtype, nested, kind):
    data, state = packed(shape, dtype, blocksize, kind, nested, device="cuda")
    expected = theirs(data, state)
    assert torch.equal(nf4.unpack_4bit(data, state), expected)
    out, whole = spread(shape, dtype, "cuda", gap=8)
    assert torch.equal(nf4.unpack_4bit(data, state, out), expected) and (whole[:, shape[1] :] == 77).all()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_as_floats(storage):
    data, state = packed((256, 512), torch.bfloat16, device="cuda", storage=storage)
    assert torch.equal(nf4.unpack_4bit(data, state), theirs(data, state))


def test_a_wrong_table_is_seen():
    data, state = packed((128, 192), torch.bfloat16, device="cuda")
    expected = theirs(data, state)
    state.code = state.code.roll(1)
    assert not torch.equal(nf4.unpack_4bit(data, state), expected)


def test_more_than_2_to_the_31_values():
    rows, cols = 2**19 + 4, 4096
    data, state = packed((256, cols), torch.bfloat16, device="cuda", nested=False)
    big = data.view(-1).repeat(rows // 256 + 1)[: rows * cols // 2]
    state.absmax = state.absmax.repeat(rows // 256 + 1)[: rows * cols // 64].contiguous()
    state.shape = torch.Size((rows, cols))
    out = nf4.unpack_4bit(big, state)
    state.shape = torch.Size((256, cols))
    part = theirs(data, state)
    assert torch.equal(out[-260:-4], part) and torch.equal(out[-4:], part[:4])


def test_unpacking_opcheck():
    data, state = packed((64, 128), torch.bfloat16, device="cuda")
    out = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
    torch.library.opcheck(torch.ops.pantheraml.unpack_4bit, (out, data, *nf4.read_state(state)))
