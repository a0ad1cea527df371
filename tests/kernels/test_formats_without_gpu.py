"""The kernels of 4-bit and FP8 weights compile for GPUs that are not there."""

from __future__ import annotations

import pytest
import triton.language as tl

from pantheraml.kernels import fp8, fp8_factor, fp8_norm, fp8_product, nf4, unpack_table
from tests.kernels.test_triton_without_gpu import compile_for

TRITON = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def compile_unpacking(capability, dtype, rows, nested, per):
    """The kernel of one weight, its arguments divisible by 16 as those of a usual weight are."""
    pointers = {
        "packed_ptr": "*i32" if per == 8 else "*u8", "absmax_ptr": "*u8" if nested else "*fp32",
        "code_ptr": "*fp32", "absmax2_ptr": "*fp32", "code2_ptr": "*fp32", "offset_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
    }  # fmt: skip
    numbers = {"words": "i32", "values": "i64", "cols": "i32", "stride": "i64", "words_in_row": "i32"}
    constants = {"PER": per, "BLOCK": 64, "BLOCK2": 256, "NESTED": nested, "ROWS": rows, "WORDS": 512}
    types = pointers | numbers
    return compile_for(nf4._unpack_kernel, types, constants, capability, 4, by_16=types if per == 8 else ())


def compile_table(capability, dtype, nested, entries):
    constants = {"OUT": TRITON[dtype], "BLOCK": 64, "BLOCK2": 256, "NESTED": nested, "ENTRIES": entries}
    constants |= {"WORDS": nf4.TILE["WORDS"]}
    kernel, warps = unpack_table._unpack_table_kernel, nf4.TILE["num_warps"]
    return compile_for(kernel, {"table_ptr": "*i64"}, constants, capability, warps)


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("rows", "nested", "per"), [(0, True, 8), (0, False, 8), (1, True, 8), (2, True, 2), (0, True, 2)]
)
def test_unpacking_compiles(capability, dtype, rows, nested, per):
    compiled = compile_unpacking(capability, dtype, rows, nested, per)
    assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= 16 * 1024


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize(("dtype", "entries"), [("bf16", 1), ("fp16", 8), ("fp32", 64)])
def test_unpacking_a_table_compiles(capability, dtype, entries):
    compiled = compile_table(capability, dtype, True, entries)
    assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= 16 * 1024


def wide_accesses(compiled):
    """How many loads and stores of 16 bytes there are, and how many stores in all."""
    ptx = compiled.asm["ptx"]
    stores = ptx.count("st.global")
    return ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32"), stores


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("dtype", "stores"), [("bf16", 4), ("fp16", 4), ("fp32", 8)])
def test_a_table_is_read_and_written_in_16_bytes_too(dtype, stores, nested):
    """Addresses from memory tell the compiler nothing of how they are aligned; the kernel has to."""
    assert wide_accesses(compile_unpacking(90, dtype, 1, nested, 8)) == (1, stores, stores)
    assert wide_accesses(compile_table(90, dtype, nested, 4)) == (1, stores, stores)


def check_compiled(kernel, types, constants, capability, warps):
    compiled = compile_for(kernel, types, constants, capability, warps)
    assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= 100 * 1024
    return compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("margin", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_quantising_compiles(capability, dtype, margin, scaled):
    types = {
        "x_ptr": f"*{dtype}",
        "x_stride": "i64",
        "by_ptr": "*fp32",
        "m_ptr": f"*{dtype}",
        "m_stride": "i64",
    }
    types |= {
        "out_ptr": "*fp8e4nv",
        "scale_ptr": "*fp32",
        "cols": "i32",
        "m_cols": "i32",
        "least": "fp32",
        "largest_ptr": "*fp32",
    }
    constants = {"SCALED": scaled, "MARGIN": margin, "BLOCK": 4096, "BLOCK_M": 64}
    ptx = check_compiled(fp8._quantise_kernel, types, constants, capability, 4)
    assert "e4m3x2" in ptx  # the hardware's own rounding


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("scaled", [True, False])
def test_splitting_compiles(capability, scaled):
    types = {"source_ptr": "*bf16", "by_ptr": "*fp32", "target_ptr": "*fp8e4nv", "rows": "i32", "cols": "i32"}
    types |= {"stride_row": "i64", "stride_col": "i64", "target_stride": "i64", "least": "fp32"}
    types["largest_ptr"] = "*fp32"
    tile = {name: size for name, size in fp8_factor._TILE.items() if name != "num_warps"}
    for kernel in (fp8_factor._largest_kernel, fp8_factor._split_kernel):
        known = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        check_compiled(kernel, known, {"SCALED": scaled, **tile}, capability, 4)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize("keep_h", [True, False])
def test_the_quantised_norm_compiles(capability, cast_first, keep_h):
    types = {
        "x_ptr": "*bf16",
        "w_ptr": "*bf16",
        "h_ptr": "*bf16",
        "out_ptr": "*fp8e4nv",
        "scale_ptr": "*fp32",
    }
    types |= {
        "x_stride": "i64",
        "cols": "i32",
        "eps": "fp32",
        "offset": "fp32",
        "m_ptr": "*bf16",
        "m_stride": "i64",
    }
    types |= {"largest_ptr": "*fp32", "t_ptr": "*bf16", "m_cols": "i32", "least": "fp32"}
    constants = {
        "CAST_FIRST": cast_first,
        "KEEP_H": keep_h,
        "MARGIN": not keep_h,
        "BLOCK": 4096,
        "BLOCK_M": 64,
    }
    check_compiled(fp8_norm._norm_rows_kernel, types, constants, capability, 8)


@pytest.mark.parametrize("capability", [80, 90])
def test_turning_compiles(capability):
    types = {
        "w_ptr": "*u8",
        "out_ptr": "*u8",
        "rows": "i32",
        "cols": "i32",
        "stride": "i64",
        "out_stride": "i64",
    }
    tile = {name: size for name, size in fp8_product._TURN.items() if name != "num_warps"}
    check_compiled(fp8_product._turn_kernel, types, tile, capability, fp8_product._TURN["num_warps"])
