"""The kernels of 4-bit and FP8 weights without a GPU: interpreted, and compiled for GPUs that are not there."""

from __future__ import annotations

import pytest

from pantheraml.kernels import nf4
from tests.kernels.test_triton_without_gpu import compile_for
from tests.kernels.test_triton_without_gpu import test_interpreted as run_interpreted


@pytest.mark.parametrize("file", ["interpreted_nf4.py"])
def test_interpreted_formats(file):
    run_interpreted(file)


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("rows", "nested", "per"), [(0, True, 8), (0, False, 8), (1, True, 8), (2, True, 2), (0, True, 2)]
)
def test_unpacking_compiles(capability, dtype, rows, nested, per):
    pointers = {
        "packed_ptr": "*i32" if per == 8 else "*u8", "absmax_ptr": "*u8" if nested else "*fp32",
        "code_ptr": "*fp32", "absmax2_ptr": "*fp32", "code2_ptr": "*fp32", "offset_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
    }  # fmt: skip
    numbers = {"words": "i32", "values": "i64", "cols": "i32", "stride": "i64", "words_in_row": "i32"}
    constants = {"PER": per, "BLOCK": 64, "BLOCK2": 256, "NESTED": nested, "ROWS": rows, "WORDS": 512}
    compiled = compile_for(nf4._unpack_kernel, pointers | numbers, constants, capability, 4)
    assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= 16 * 1024
