"""4-bit weights on a CPU: the plain path against bitsandbytes, bit by bit, and the custom op."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import nf4
from pantheraml.kernels.unpack_table import UnpackTable
from tests.kernels.nf4_cases import SHAPES, TABLES, check_table, packed, spread, theirs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocksize"), SHAPES)
def test_equals_bitsandbytes(shape, blocksize, dtype, nested, kind):
    data, state = packed(shape, dtype, blocksize, kind, nested)
    out = nf4.unpack_4bit(data, state)
    assert out.dtype == dtype and torch.equal(out, theirs(data, state))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_as_floats(storage):
    data, state = packed((64, 64), torch.bfloat16, storage=storage)
    assert data.dtype == storage
    assert torch.equal(nf4.unpack_4bit(data, state), theirs(data, state))


def test_an_output_whose_rows_lie_apart():
    data, state = packed((33, 40), torch.bfloat16, 32)
    out, whole = spread((33, 40), torch.bfloat16)
    assert nf4.unpack_4bit(data, state, out) is out
    assert torch.equal(out, theirs(data, state)) and (whole[:, 40:] == 77).all()


def test_a_wrong_table_is_seen():
    data, state = packed((128, 192), torch.bfloat16)
    expected = theirs(data, state)
    state.code = state.code.roll(1)
    assert not torch.equal(nf4.unpack_4bit(data, state), expected)


@pytest.mark.parametrize("nested", [True, False])
def test_opcheck(nested):
    data, state = packed((16, 24), torch.float32, nested=nested)
    out = torch.empty(16, 24)
    torch.library.opcheck(torch.ops.pantheraml.unpack_4bit, (out, data, *nf4.read_state(state)))
    torch.ops.pantheraml.unpack_4bit(out, data, *nf4.read_state(state))
    assert torch.equal(out, theirs(data, state))


def test_no_gradient_comes_near():
    data, state = packed((8, 64), torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    weight = nf4.unpack_4bit(data, state)
    assert not weight.requires_grad and (x @ weight.T).requires_grad


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", TABLES)
def test_a_table_without_a_gpu(shapes, dtype, nested):
    assert not check_table(shapes, dtype, nested=nested).is_one_launch


def test_a_table_of_parameters():
    from bitsandbytes.nn import Params4bit

    data, state = packed((32, 64), torch.bfloat16)
    weight = Params4bit(data, quant_state=state, bnb_quantized=True)
    out = torch.empty(32, 64, dtype=torch.bfloat16)
    table = UnpackTable([(weight, weight.quant_state)], [out])
    assert type(table._parts[0].packed) is torch.Tensor
    table.write()
    assert torch.equal(out, theirs(data, state))


def test_tables_of_nothing():
    UnpackTable([], []).write()
    data, state = packed((32, 64), torch.float32)
    UnpackTable([(data, state)], [torch.empty(0, 64)]).write()
    with pytest.raises(ValueError, match="zip"):
        UnpackTable([(data, state)], [])
