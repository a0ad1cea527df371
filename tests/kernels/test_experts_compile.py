"""The Triton kernels of experts compiled for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pantheraml.kernels import expert_activation, expert_groups, expert_routing, grouped_gemm, grouped_outer

CPU = torch.device("cpu")
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Bytes of shared memory that a GPU gives a program.
MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}


def compiled(kernel, pointers, constants, capability):
    """Compile as at run time: pointers and sizes divisible by 16, with the tile's warps and stages."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if types[name] not in ("fp32", "constexpr") and name != "tiles"
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=divisible)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f"sm_{capability}" in result.asm["ptx"] and result.asm["cubin"]
    assert result.metadata.shared <= MEMORY[capability]
    return result.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    ("dtype", "block", "cols"),
    [
        (torch.bfloat16, 128, 4096),
        (torch.bfloat16, 64, 4096),
        (torch.bfloat16, 16, 4096),
        (torch.bfloat16, 128, 16),
        (torch.float32, 128, 4096),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_products_compile(capability, dtype, block, cols, turned, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "_shared_memory", lambda _: MEMORY[capability])
    tile = grouped_gemm.tile_of(block, cols, dtype, CPU)
    kind = f"*{SHORT[dtype]}"
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "bias_ptr", "t_ptr", "b_ptr"), kind)
    pointers |= {"rows_ptr": "*i32", "tiles_ptr": "*i32", "scale": "fp32"}
    flags = dict(INDEXED=True, BIAS=True, LORA=True, RANK=16, EVEN=not turned, GROUP=8)
    one = {"w_sn" if turned else "w_sk": 1, "b_sr": 1}
    ptx = compiled(grouped_gemm._rows_kernel, pointers, {**tile, **flags, **one}, capability)
    if dtype == torch.bfloat16:
        assert ("wgmma" if capability == 90 and block >= 64 else "mma.sync") in ptx and "cp.async" in ptx


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("height", "width"), [(16, 4096), (4096, 16), (4096, 4096)])
def test_sums_of_outer_products_compile(capability, height, width):
    tile = grouped_outer.tile_of(height, width, torch.bfloat16, True)
    pointers = dict.fromkeys(("left_ptr", "right_ptr", "d_ptr"), "*bf16")
    pointers |= dict.fromkeys(("l_ptr", "r_ptr", "ends_ptr"), "*i32")
    constants = {**tile, "L_INDEXED": True, "R_INDEXED": True, "left_sc": 1, "right_sc": 1}
    compiled(grouped_outer._outer_kernel, pointers, constants, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_small_kernels_compile(capability):
    small = {"num_warps": 4}
    compiled(
        expert_groups._tile_kernel,
        {"ends_ptr": "*i32", "tiles_ptr": "*i32"},
        {**small, "EXPERTS": 128, "IDS": 64},
        capability,
    )
    pointers = {**dict.fromkeys(("y_ptr", "bias_ptr", "t_ptr", "b_ptr"), "*bf16"), "tiles_ptr": "*i32"}
    flags = dict(BIAS=True, LORA=True, RANK=16, BLOCK_M=64, BLOCK_N=128)
    compiled(grouped_gemm._add_kernel, pointers, {**small, **flags}, capability)
    pointers = {"y_ptr": "*bf16", "place_ptr": "*i64", "w_ptr": "*fp32", "out_ptr": "*bf16"}
    compiled(expert_routing._sum_kernel, pointers, {**expert_routing.SUM_TILE, "WEIGHTED": True}, capability)
    numbers = {"alpha": "fp32", "limit": "fp32"}
    for clamped in (False, True):
        pointers = {"gu_ptr": "*bf16", "v_ptr": "*bf16", **numbers}
        compiled(
            expert_activation._forward_kernel,
            pointers,
            {**expert_activation.FORWARD_TILE, "CLAMPED": clamped, "IN_TURN": clamped},
            capability,
        )
        pointers = {**dict.fromkeys(("dv_ptr", "gu_ptr", "dgu_ptr", "wv_ptr"), "*bf16"), **numbers}
        pointers |= {"w_ptr": "*fp32", "dw_ptr": "*fp32"}
        compiled(
            expert_activation._backward_kernel,
            pointers,
            {**expert_activation.BACKWARD_TILE, "CLAMPED": clamped, "IN_TURN": clamped, "WITH_VALUE": True},
            capability,
        )
