"""Triton, where it is installed, and whether its kernels launch on a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # torch for the CPU does not bring Triton
        triton = tl = None

__all__ = ["FixedLaunch", "jit", "launching_on", "runs_triton", "tl", "triton", "why_no_triton"]


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit``; without Triton the kernel stays a function that nobody calls."""
    return kernel if triton is None else triton.jit(kernel)


class FixedLaunch:
    """A launch that is made again and again with the very same arguments.

    What was compiled for them is launched at once from the second time on: to find it by their types is most of what a
    launch costs the host (20 us against 8).

    Args:
        kernel: a Triton kernel.
        grid: programs along each axis.
        arguments: all of them, constants too, in their order; kept.
        options: of the compiler.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], **options: Any
    ) -> None:
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._again: Callable[..., Any] | None = None

    def __call__(self) -> None:
        """Launch on the current device, always the same one."""
        if self._again is not None:
            self._again(*self._arguments)
            return
        compiled = self._kernel[self._grid](*self._arguments, **self._options)
        self._again = None if compiled is None else compiled[self._grid]  # the interpreter compiles nothing


@jit
def _write_one(out_ptr):
    tl.store(out_ptr, 1)


# Triton's interpreter, chosen by TRITON_INTERPRET before Triton is imported, runs kernels on tensors of the CPU.
_INTERPRETED = triton is not None and not isinstance(_write_one, triton.JITFunction)


def runs_triton(x: Tensor) -> bool:
    """Whether kernels take ``x``: it lies on a GPU, or they are interpreted. Else plain PyTorch computes."""
    return triton is not None and (_INTERPRETED or x.device.type == "cuda")


def launching_on(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels launched inside run on the device of ``x``, which need not be the current one."""
    device = x.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE  # entering a device takes the host as long as some launches
    return torch.cuda.device(device)


_HERE = nullcontext()


@lru_cache(maxsize=16)
def why_no_triton(device: torch.device) -> str | None:
    """Why Triton kernels do not run on ``device``, or None when they do.

    On a GPU a kernel of one store is launched, once per device: a missing compiler or driver shows only then.
    """
    if device.type != "cuda":
        return f"Triton needs a GPU, the model is on {device.type}"
    if triton is None:
        return "Triton is not installed"
    try:
        out = torch.zeros(1, dtype=torch.int32, device=device)
        with torch.cuda.device(device):
            _write_one[(1,)](out)
        return None if out.item() == 1 else "a Triton kernel ran and wrote nothing"
    except Exception as error:
        return f"a Triton kernel did not launch ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
