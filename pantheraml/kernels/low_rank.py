"""The addend that LoRA brings to a tensor: ``y + scale * t B^T``, inside the kernel that touches y anyway.

Shapes: y (T, N), t (T, R) is the adapter's input product ``x A^T``, B (N, R). A product of its own would read and
write all of y once more; here only t and B are read, which are R / N and R / T of it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pantheraml.kernels.launch import jit, tl

# The widest adapter the kernels take; its two factors must fit into registers beside a tile of y.
MAX_RANK = 128


class LowRank(NamedTuple):
    """``scale * t B^T``.

    Attributes:
        t: (T, R), stride 1 along R.
        b: (N, R), contiguous.
        scale: the adapter's scale.
    """

    t: Tensor
    b: Tensor
    scale: float

    def dense(self) -> Tensor:
        """(T, N) in the dtype of t."""
        return (self.t @ self.b.T) * self.scale


def padded_rank(rank: int) -> int:
    """The smallest power of two that holds ``rank`` and that a tensor core can multiply."""
    return max(16, 1 << (rank - 1).bit_length())


@jit
def low_rank_tile(t_ptr, t_stride, b_ptr, row, col, rows, cols, rank, scale, RANK: tl.constexpr):
    """``scale * t[row] b[col]^T`` in float32 for one tile; ``row`` and ``col`` are index vectors."""
    r = tl.arange(0, RANK)
    t = tl.load(
        t_ptr + row.to(tl.int64)[:, None] * t_stride + r[None, :],
        mask=(row < rows)[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    b = tl.load(
        b_ptr + col[None, :] * rank + r[:, None], mask=(col < cols)[None, :] & (r < rank)[:, None], other=0.0
    )
    return tl.dot(t, b.to(t.dtype), input_precision="ieee") * scale
