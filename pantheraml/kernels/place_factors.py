"""Write LoRA's factors into the margins of a stack of weights, scaled and rounded to its dtype, in one launch.

    [ W | s B ]
    [ A |     ]      W (N, K), A (R, K), B (N, R)

Both factors change at every optimizer step, W never. A table on the device lists what goes where, so that one program
grid serves all factors of a stack whatever their number and sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.launch import FixedLaunch, jit, launching_on, runs_triton, tl

_BLOCK = 2048


class Placement(NamedTuple):
    """``target = scale * source``: target (rows, cols), stride 1 along a row; source as many numbers, contiguous."""

    source: Tensor
    target: Tensor
    scale: float

    @property
    def key(self) -> tuple[int | float, ...]:
        """What the table says about it: addresses, sizes, stride, scale."""
        return (
            self.source.data_ptr(),
            self.target.data_ptr(),
            *self.target.shape,
            self.target.stride(0),
            self.scale,
        )


@jit
def _place_kernel(
    table_ptr, scale_ptr, SOURCE: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(0)
    table_ptr += entry * 5
    source = tl.load(table_ptr).to(tl.pointer_type(SOURCE))  # pyright: ignore[reportArgumentType]
    target = tl.load(table_ptr + 1).to(tl.pointer_type(TARGET))  # pyright: ignore[reportArgumentType]
    rows = tl.load(table_ptr + 2)
    cols = tl.load(table_ptr + 3)
    stride = tl.load(table_ptr + 4)
    scale = tl.load(scale_ptr + entry)
    for start in range(tl.program_id(1) * BLOCK, rows * cols, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < rows * cols
        value = tl.load(source + at, mask=there, other=0.0).to(tl.float32) * scale
        tl.store(target + (at // cols) * stride + at % cols, value.to(TARGET), mask=there)


class Table:
    """The placements of one stack, kept on the device and rebuilt only when an address or a scale changes."""

    def __init__(self) -> None:
        self._placements: list[Placement] | None = None
        self._addresses: list[int] = []
        self._launch: FixedLaunch | None = None

    def write(self, placements: list[Placement]) -> None:
        """Do every placement; all sources share one dtype, all targets another.

        A list that was given before is taken to be what it was, but for where its sources lie.
        """
        if not placements:
            return
        if placements is not self._placements or self._have_moved():
            self._prepare(placements)
        if self._launch is not None:
            with launching_on(placements[0].target):
                self._launch()
            return
        with torch.no_grad():
            for source, target, scale in placements:
                torch.mul(source.view(target.shape), scale, out=target)

    def _have_moved(self) -> bool:
        found = self._placements or []
        return any(p.source.data_ptr() != at for p, at in zip(found, self._addresses, strict=True))

    def _prepare(self, placements: list[Placement]) -> None:
        first = placements[0]
        self._placements, self._launch = placements, None
        self._addresses = [placement.source.data_ptr() for placement in placements]
        if not runs_triton(first.target) or any(not p.source.is_contiguous() for p in placements):
            return
        keys, device = [placement.key for placement in placements], first.target.device
        table = torch.tensor([key[:5] for key in keys], dtype=torch.int64, device=device)
        scales = torch.tensor([key[5] for key in keys], dtype=torch.float32, device=device)
        arguments = table, scales, _NAMES[first.source.dtype], _NAMES[first.target.dtype], _BLOCK
        self._launch = FixedLaunch(_place_kernel, (len(placements), 64, 1), arguments, num_warps=4)


_NAMES = {} if tl is None else {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip
