"""What every attention backend does, and all that decides which one does it.

For each row, head h, its key head g = h // (H / K) and query i, over the keys j that i may see
(j <= i; j > i - window; the same document):

    z[i, j] = scale * q[i] . k[j];  with a soft-cap c: z = c * tanh(z / c)
    lse[i]  = log sum_j exp(z[i, j]);  with a sink logit s[h]: log (exp(s[h]) + sum_j exp(z[i, j]))
    out[i]  = sum_j exp(z[i, j] - lse[i]) v[j]

Shapes: q (B, S, H, D), k and v (B, S, K, D) with K a divisor of H, out as q. lse is float32:
(B, H, S) for dense rows, (H, B * S) for packed ones.

A backend computes all but the sinks, which need no kernel of their own (``sinks.py``): its backward takes
``out`` and ``lse`` as they are given, so they may contain the sinks, and q, k, v may have been recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pantheraml.kernels.attention.layout import Layout

Kept = tuple[Tensor, ...]
HALF = (torch.bfloat16, torch.float16)


class Features(NamedTuple):
    """What a backend is probed for; lengths and numbers of rows are not among it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    groups: int  # query heads per key head
    packed: bool
    window: bool
    softcap: bool
    sinks: bool


@dataclass(frozen=True)
class AttentionCall:
    """All that decides about one call, besides the tensors.

    Attributes:
        rows: B.
        tokens: S.
        heads: H.
        kv_heads: K.
        head_dim: D, of queries, keys and values alike.
        dtype: of q, k and v.
        device: where they are.
        layout: documents of packed rows; None: every row is one document.
        scale: of the logits.
        window: tokens a query may look back, itself included; None for all.
        softcap: of the logits; None for none.
        sinks: whether every head has a learned logit that no value belongs to.
    """

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None = None
    scale: float = 1.0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        layout: Layout | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> AttentionCall:
        """The call for q (B, S, H, D) and k (B, S, K, D); a window as long as the documents is none.

        ``scale`` None means 1 / sqrt(D); a layout without documents is none.
        """
        rows, tokens, heads, dim = q.shape
        factor = dim**-0.5 if scale is None else scale
        shape = rows, tokens, heads, k.shape[2], dim
        return cls(*shape, q.dtype, q.device, layout, factor, window, softcap, sinks).reduced()

    def reduced(self) -> AttentionCall:
        """Itself without a layout that has no documents, and without a window as long as the documents."""
        layout = None if self.layout is None or self.layout.cu_seqlens is None else self.layout
        longest = self.tokens if layout is None else layout.max_seqlen
        window = None if self.window is None or self.window >= longest else self.window
        return replace(self, layout=layout, window=window)

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.layout is not None

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @cached_property
    def features(self) -> Features:
        """What a backend must be able to do for this call."""
        return Features(
            self.device,
            self.dtype,
            self.head_dim,
            self.groups,
            self.packed,
            self.window is not None,
            self.softcap is not None,
            self.sinks,
        )

    @property
    def offsets(self) -> tuple[Tensor | None, int]:
        """(cu_seqlens, longest document) for kernels: (None, S) for dense rows."""
        if self.layout is None:
            return None, self.tokens
        return self.layout.cu_seqlens, self.layout.max_seqlen

    def tokens_of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors (B, S, heads, D) as kernels want them: (B * S, heads, D) for packed rows."""
        if self.layout is None:
            return tensors
        return tuple(t.reshape(-1, *t.shape[2:]) for t in tensors)

    def rows_of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What ``tokens_of`` did, undone."""
        return tuple(t.view(self.rows, self.tokens, *t.shape[-2:]) for t in tensors)

    def per_token(self, lse: Tensor) -> Tensor:
        """A view of ``lse`` as (B, S, H)."""
        if self.layout is None:
            return lse.transpose(1, 2)
        return lse.t().unflatten(0, (self.rows, self.tokens))


def why_no_flash(call: AttentionCall) -> str | None:
    """What every FlashAttention asks for: a GPU, half precision, heads of 8, 16, ... 256 numbers."""
    if call.device.type != "cuda":
        return "needs a GPU"
    if call.dtype not in HALF:
        return f"computes in bfloat16 or float16, not in {call.dtype}"
    if call.head_dim > 256 or call.head_dim % 8:
        return f"takes heads of 8, 16, ... 256 numbers, not {call.head_dim}"
    return None


def why_not_repeatable() -> str | None:
    """Why a backend whose backward has no fixed order of sums is not to be used now, or None."""
    return "adds gradients up in no fixed order" if torch.are_deterministic_algorithms_enabled() else None


class AttentionBackend(Protocol):
    """One way to compute attention, without autograd and without state of its own."""

    name: str

    def why_not(self, call: AttentionCall) -> str | None:
        """Why this backend does not take ``call``, or None. Cheap but for the first call of a kind."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """Attention without sinks.

        Args:
            q: (B, S, H, D), any strides with stride 1 along D.
            k: (B, S, K, D), likewise.
            v: (B, S, K, D), likewise.
            call: describes them.

        Returns:
            out (B, S, H, D) of the dtype of q, and what the backward needs besides q, k, v and out: lse first.
        """
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, shaped as they are.

        Args:
            dout: gradient of out, (B, S, H, D).
            q: as given to the forward, or recomputed.
            k: likewise.
            v: likewise.
            out: what the forward returned, with sinks applied.
            kept: what the forward returned, lse with sinks applied.
            call: the forward's.

        Returns:
            dq (B, S, H, D), dk (B, S, K, D), dv (B, S, K, D).
        """
        ...
