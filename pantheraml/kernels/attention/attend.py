"""Attention with autograd through the backend of the table, and the same in two steps without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pantheraml.kernels.attention.backend import AttentionBackend, AttentionCall, Kept
from pantheraml.kernels.attention.layout import eagerly
from pantheraml.kernels.attention.sinks import add_sinks, sinks_gradient
from pantheraml.kernels.attention.table import choose


def forward(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Kept]:
    """``backend.forward``, then the sinks (H,) if there are any."""
    out, kept = backend.forward(q, k, v, call)
    if sinks is not None:
        add_sinks(out, kept[0], sinks, call)
    return out, kept


def backward(
    backend: AttentionBackend,
    dout: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    kept: Kept,
    call: AttentionCall,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``backend.backward`` for ``heads`` (q, k, v), and the gradient of the sinks."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dsinks = None if sinks is None else sinks_gradient(dout, out, kept[0], sinks, call)
    return *backend.backward(dout, *heads, out, kept, call), dsinks


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttentionCall
    ) -> Tensor:
        backend = choose(call)
        out, kept = forward(backend, q, k, v, call, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, *kept)
        ctx.backend, ctx.call = backend, call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, *kept = ctx.saved_tensors
        return *backward(ctx.backend, dout, (q, k, v), out, tuple(kept), ctx.call, sinks), None


@eagerly
def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, sinks: Tensor | None = None) -> Tensor:
    """Causal attention with a gradient, by the backend that ``choose`` names.

    Args:
        q: (B, S, H, D), stride 1 along D.
        k: (B, S, K, D), likewise.
        v: (B, S, K, D), likewise.
        call: describes them.
        sinks: (H,) if ``call.sinks``.

    Returns:
        (B, S, H, D).
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _Attend.apply(q, k, v, sinks, call)  # pyright: ignore[reportReturnType]
