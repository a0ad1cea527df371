"""Which of the rows that are sorted by expert belong to which, and the tiles that a kernel walks over.

    expert e has the rows from ends[e - 1] up to ends[e]; ends (E,) int32 stays on the device

A kernel's tile must not hold rows of two experts, so how many tiles there are is known on the device alone. The host
launches the most there can be, S / block + E, and the map says of each which rows it has, or that it has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, launching_on, tl

# The most rows of a tile, and which share of a tile the average expert must fill for it to be taken: the last tile of
# an expert is half empty on average, a smaller tile reads its weights more often.
LARGEST_BLOCK = 128
FILL = 0.75
# Tiles that one program of the map describes.
_TILE_IDS = 64


@jit
def _tile_kernel(ends_ptr, tiles_ptr, experts, count, block, EXPERTS: tl.constexpr, IDS: tl.constexpr):
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends_ptr + e, mask=e < experts, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e < experts) & (e > 0), other=0)
    size = tl.where(e < experts, (end - start + block - 1) // block, 0)
    last = tl.cumsum(size, axis=0)
    tile = tl.program_id(0) * IDS + tl.arange(0, IDS)
    mine = (tile[:, None] >= (last - size)[None, :]) & (tile[:, None] < last[None, :])
    there = tl.sum(mine.to(tl.int32), axis=1) > 0
    expert = tl.sum(tl.where(mine, e[None, :], 0), axis=1)
    row = tl.sum(tl.where(mine, start[None, :] + (tile[:, None] - (last - size)[None, :]) * block, 0), axis=1)
    row_end = tl.sum(tl.where(mine, end[None, :], 0), axis=1)
    tl.store(tiles_ptr + tile, tl.where(there, expert, -1), mask=tile < count)
    tl.store(tiles_ptr + count + tile, row, mask=tile < count)
    tl.store(tiles_ptr + 2 * count + tile, row_end, mask=tile < count)


class Groups:
    """Which sorted rows belong to which expert.

    Args:
        ends: (E,) int32, rows of the experts up to and with each one.
        num_rows: S, at least ``ends[-1]``; rows behind it are left undefined.
    """

    def __init__(self, ends: Tensor, num_rows: int) -> None:
        self.ends, self.num_rows = ends, num_rows
        self._tiles: dict[int, Tensor] = {}

    @property
    def block(self) -> int:
        """Rows of a tile that fit the average expert."""
        average = self.num_rows / self.ends.numel()
        return next((b for b in (128, 64, 32) if b <= LARGEST_BLOCK and average >= FILL * b), 16)

    def tiles(self, block: int) -> Tensor:
        """(3, tiles) int32: expert, first row and end of its rows, for each tile of ``block`` rows.

        The number of tiles is the largest possible one; those too many have expert -1.
        """
        if block not in self._tiles:
            experts = self.ends.numel()
            count = -(-self.num_rows // block) + experts
            tiles = torch.empty((3, count), dtype=torch.int32, device=self.ends.device)
            with launching_on(tiles):
                _tile_kernel[(-(-count // _TILE_IDS),)](
                    self.ends,
                    tiles,
                    experts,
                    count,
                    block,
                    EXPERTS=1 << (experts - 1).bit_length(),
                    IDS=_TILE_IDS,
                )
            self._tiles[block] = tiles
        return self._tiles[block]

    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each expert, on the host."""
        ends = self.ends.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))
