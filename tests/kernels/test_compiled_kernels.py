"""Kernels compile for GPUs that are not there, within the shared memory of the smallest of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from pantheraml.kernels import (
    add_norm,
    cross_entropy,
    drop_bits,
    dropping_tiles,
    keyed_dropout,
    layer_norm,
    place_factors,
    rope,
    rope_qkv,
    swiglu,
)
from pantheraml.kernels.row_tiles import row_tile
from tests.kernels.test_triton_without_gpu import compile_for

# What one program may use on each: 48 KiB without asking, less than the most that may be asked for.
SHARED = 48 * 1024
BOTH = (True, False)
HEADS = {"HALF": 64, "LANES": 64, "TAIL": 0, "TAIL_LANES": 16, "COS_WIDTH": 128, "BLOCK_M": rope.BLOCK_M}
PARTIAL = {"HALF": 12, "LANES": 16, "TAIL": 24, "TAIL_LANES": 32, "COS_WIDTH": 12, "BLOCK_M": rope.BLOCK_M}

LARGE = {"HALF": 128, "LANES": 128, "TAIL": 0, "TAIL_LANES": 16, "COS_WIDTH": 256, "BLOCK_M": rope.BLOCK_M}


def split(blocks):
    """Constants and warps of a tile."""
    blocks = dict(blocks)
    return blocks, blocks.pop("num_warps")


def losses():
    blocks, warps = split(cross_entropy._BLOCKS)
    for cap, figures in itertools.product(BOTH, BOTH):
        flags = {"CAP": cap, "FIGURES": figures, "GRADIENT": figures}
        yield cross_entropy._score_kernel, {**flags, **blocks}, warps
    for cap in BOTH:
        yield cross_entropy._gradient_kernel, {"CAP": cap, **blocks}, warps


def layer_norms():
    for cols, flag in ((100, False), (4096, True)):
        blocks, warps = split(row_tile(cols))
        yield layer_norm._layer_norm_kernel, {"BIAS": flag, **blocks}, warps
        yield layer_norm._layer_norm_backward_kernel, {"WITH_DW": flag, **blocks}, warps


def rotary_positions():
    for shape, norm in ((HEADS, False), (PARTIAL, True)):
        flags = {"TURN": True, "BIAS": True, "NORM": norm, "CAST_FIRST": True}
        yield rope._rotate_kernel, {**flags, **shape}, rope._WARPS
        yield rope._rotate_back_kernel, {"TURN": True, "NORM": norm, **shape}, rope._WARPS


def rotary_positions_of_q_k_and_v():
    for shape, norm in ((HEADS, False), (PARTIAL, True), (LARGE, True)):
        biases = dict.fromkeys(("BIAS_Q", "BIAS_K", "BIAS_V"), not norm)
        flags = {"NORM": norm, "CAST_FIRST_Q": True, "CAST_FIRST_K": False}
        yield rope_qkv._rotate_qkv_kernel, {**biases, **flags, **shape}, rope._WARPS
        flags |= {"WITH_DW": shape is PARTIAL}
        yield rope_qkv._rotate_qkv_back_kernel, {**flags, **shape}, rope._WARPS


def gated_activations():
    for activation in range(len(swiglu.ACTIVATIONS)):
        blocks, warps = split(swiglu._FORWARD)
        yield swiglu._glu_forward_kernel, {"ACTIVATION": activation, **blocks}, warps
        blocks, warps = split(swiglu._BACKWARD)
        yield swiglu._glu_backward_kernel, {"ACTIVATION": activation, **blocks}, warps


def residuals():
    for cols, flag in ((100, False), (4096, True)):
        blocks, warps = split(row_tile(cols))
        yield add_norm._add_norm_kernel, {"CAST_FIRST": flag, **blocks}, warps
    for flag in BOTH:
        flags = {"RESIDUAL": flag, "KEEP_H": flag, "CAST_FIRST": True, "BLOCK": 4096}
        yield add_norm._norm_backward_kernel, flags, 8
        yield add_norm._trained_norm_backward_kernel, flags, 8


# Pointers whose elements are of one dtype whatever that of the weights and activations is.
KINDS = {
    **dict.fromkeys(("label_ptr", "table_ptr"), "*i64"),
    **dict.fromkeys(
        ("logp_ptr", "top_ptr", "log_sum_ptr", "entropy_ptr", "top1_ptr", "g_ptr", "scale_ptr"), "*fp32"
    ),
    **dict.fromkeys(("dw_ptr", "db_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "cap", "eps", "offset", "eps_q", "eps_k", "offset_q", "offset_k"), "fp32"),
}


def types_of(kernel, constants, dtype):
    """The type of every argument that is not a constant, told from its name."""

    def kind(name):
        if name == "g_ptr" and kernel is not cross_entropy._gradient_kernel:
            return f"*{dtype}"
        if name in KINDS:
            return KINDS[name]
        if name.endswith("_ptr"):
            return f"*{dtype}"
        return "i64" if name.endswith(("stride", "_token", "_head")) else "i32"

    return {name: kind(name) for name in kernel.arg_names if name not in constants}


def compiles(kernel, constants, warps, capability, dtype):
    compiled = compile_for(kernel, types_of(kernel, constants, dtype), constants, capability, warps)
    assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED, (kernel.__name__, constants, compiled.metadata.shared)


# sm_75 has no products of bfloat16
TARGETS = [(75, "fp16"), (90, "bf16"), (80, "fp32"), (75, "fp32"), (90, "fp16"), (80, "bf16")]
FAMILIES = [
    losses, layer_norms, rotary_positions, rotary_positions_of_q_k_and_v, gated_activations, residuals
]  # fmt: skip


@pytest.mark.parametrize("kernels", FAMILIES)
def test_kernels_compile(kernels):
    """Each for one GPU and dtype, in turn."""
    for variant, target in zip(kernels(), itertools.cycle(TARGETS), strict=False):
        compiles(*variant, *target)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_for_every_gpu(kernels, target):
    for variant in kernels():
        compiles(*variant, *target)


def test_placing_factors_compiles():
    names = list(place_factors._NAMES.values())
    for source, target in zip(names, names[1:] + names[:1], strict=True):
        constants = {"SOURCE": source, "TARGET": target, "BLOCK": place_factors._BLOCK}
        types = {"table_ptr": "*i64", "scale_ptr": "*fp32"}
        assert compile_for(place_factors._place_kernel, types, constants, 80, 4).asm["cubin"]


@pytest.mark.parametrize(("add", "keyed"), list(itertools.product(BOTH, BOTH)))
@pytest.mark.parametrize(("capability", "dtype"), [(75, "fp16"), (80, "fp32"), (90, "bf16")])
def test_dropping_compiles(capability, dtype, add, keyed):
    blocks, warps = split(keyed_dropout._BLOCKS)
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "keys_ptr": "*i64" if keyed else f"*{dtype}"}
    types |= dict.fromkeys(("x_stride", "out_stride", "seed", "first_row"), "i64")
    types |= dict.fromkeys(("rows", "cols", "threshold", "first_column"), "i32") | {"scale": "fp32"}
    constants = {"KEYED": keyed, "ADD": add, **blocks}
    compiled = compile_for(keyed_dropout._drop_kernel, types, constants, capability, warps)
    assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared == 0


DROPPING = (dropping_tiles._forward_kernel, dropping_tiles._dq_kernel, dropping_tiles._dk_dv_kernel)
# What a program may ask for: KiB of an RTX 3090 or 4090, of a T4.
MOST = {75: 64, 80: 99, 90: 99}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "bias"),
    [
        (80, "bf16", 128, "seen"),
        *[pytest.param(75, "fp16", width, "seen", marks=slow) for width in (64, 128, 256)],
        *[pytest.param(80, "bf16", width, "added", marks=slow) for width in (64, 128, 256)],
        *[pytest.param(90, "fp32", width, "none", marks=slow) for width in (64, 128)],
        *[pytest.param(75, "fp32", width, "none", marks=slow) for width in (64, 128)],
    ],
)
def test_attention_that_drops_compiles(capability, dtype, width, bias):
    """Its products of whole tiles take more shared memory than 48 KiB."""
    kinds = {**KINDS, "lse_ptr": "*fp32", "delta_ptr": "*fp32", "bits_ptr": "*i64", "keep_scale": "fp32"}
    kinds |= dict.fromkeys(("bias_b", "bias_h", "bias_row", "bias_col"), "i64")
    kinds["bias_ptr"] = "*u8" if bias == "seen" else f"*{dtype}"
    of_torch = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for kernel in DROPPING:
        blocks, warps = split(dropping_tiles._blocks(kernel, width, of_torch, small=capability < 80))
        constants = {"BIAS": bias, "CAUSAL": bias == "none", "D": width, "E": width, **blocks}
        constants |= {"BLOCK_D": width, "BLOCK_E": width}
        types = types_of(kernel, constants, dtype) | {n: k for n, k in kinds.items() if n in kernel.arg_names}
        compiled = compile_for(kernel, types, constants, capability, warps)
        assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
        assert compiled.metadata.shared <= MOST[capability] * 1024


def test_bits_compile():
    blocks, warps = split(drop_bits._BLOCKS)
    types = {"out_ptr": "*u8", "keys_ptr": "*i64", "seeds_ptr": "*i64"}
    types |= dict.fromkeys(("heads", "tokens", "first", "queries", "threshold"), "i32")
    for capability, causal in zip((75, 80, 90), (True, False, True), strict=True):
        constants = {"CAUSAL": causal, "ROUNDS": drop_bits.ROUNDS, **blocks}
        compiled = compile_for(drop_bits._draw_kernel, types, constants, capability, warps)
        assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED
