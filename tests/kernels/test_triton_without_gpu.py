"""Triton kernels on a machine without a GPU: interpreted, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pantheraml.kernels import rms_norm
from pantheraml.kernels.row_tiles import row_tile

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def interpret(*paths, seconds=290):
    """Run the tests of files interpreted, which cannot be switched on in a process that has imported Triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, paths)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    return done.stdout


# Of half a minute and more; what they put together is interpreted alone in the others.
SLOW = {HERE / "interpreted_layers.py"}
FAST = set(HERE.glob("interpreted_*.py")) - SLOW


@pytest.mark.parametrize("files", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_interpreted(files):
    """All in one process: starting it takes as long as the tests of most of these files."""
    assert "skipped" not in interpret(*sorted(files))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", ["test_whole_layer.py", "test_trained_layer.py"])
def test_fused_layers_interpreted(file):
    """What the CPU tests of whole fused layers check of the plain paths holds for the kernels."""
    interpret(ROOT / "tests" / "fused" / file, seconds=1700)


def compile_for(kernel, types, constants, capability, num_warps, by_16=()):
    """Compile for an NVIDIA GPU of ``capability``; ``types`` by argument name.

    ``by_16`` names arguments that 16 divides, which a launch tells of them.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in by_16}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize(("dtype", "cols"), [("bf16", 4096), ("fp32", 128), ("fp16", 5120), ("fp32", 1)])
@pytest.mark.parametrize("cast_first", [True, False])
def test_rms_norm_compiles(capability, dtype, cols, cast_first):
    blocks = row_tile(cols)
    warps = blocks.pop("num_warps")
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "dy_ptr", "dx_ptr"), f"*{dtype}")
    pointers["dw_ptr"] = "*fp32"
    numbers = {
        "x_stride": "i64",
        "y_stride": "i64",
        "dy_stride": "i64",
        "rows": "i32",
        "cols": "i32",
        "eps": "fp32",
        "offset": "fp32",
    }
    for kernel, flags in (
        (rms_norm._forward_kernel, {"CAST_FIRST": cast_first}),
        (rms_norm._backward_kernel, {"CAST_FIRST": cast_first, "WITH_DW": True}),
        (rms_norm._backward_kernel, {"CAST_FIRST": cast_first, "WITH_DW": False}),
    ):
        # as at run time, a size of 1 becomes a constant
        ones = {name: 1 for name in ("cols", "rows") if cols == 1}
        types = {name: kind for name, kind in (pointers | numbers).items() if name in kernel.arg_names}
        types = {name: kind for name, kind in types.items() if name not in ones}
        compiled = compile_for(kernel, types, {**blocks, **flags, **ones}, capability, warps)
        assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
        assert compiled.metadata.shared <= 48 * 1024
