"""A whole decoder layer as one differentiable function, which decides what it keeps for its backward.

    "all"        everything: nothing is computed twice (92 KiB a token and layer for the 8B Llama)
    "projected"  q, k, v and the sum after the attention beside what "attended" keeps (36 KiB): gate and up are computed
                 again, and o where it has a norm of its own
    "attended"   the input, and the attention's output with its log-sum-exp (16 KiB): the products before the
                 attention, o, gate and up are computed again; attention and down are not
    "input"      the input alone (8 KiB): attention is computed again too

What is kept may lie in host memory (``HostStore``). All but the attention is computed row by row, so that long inputs
go through it in tiles and never hold an MLP's intermediates for all tokens at once, unless everything is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionBackend, AttentionCall
from pantheraml.kernels.rope import Rotary
from pantheraml.models.activation_sizes import TILE
from pantheraml.models.fused import halves
from pantheraml.models.fused.host_store import HostStore
from pantheraml.models.fused.parts import InputPart, MiddlePart, MLPPart

Keep = Literal["all", "projected", "attended", "input"]
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its parts, the attention, and what is kept.

    Attributes:
        input: the parts of the layer.
        middle: likewise.
        mlp: likewise.
        rotary: cos and sin of the tokens.
        attention: who computes the attention.
        call: how.
        keep: what stays for the backward.
        store: where it stays, if not on the device.
        tile: tokens computed at a time, where not everything is kept.
    """

    input: InputPart
    middle: MiddlePart
    mlp: MLPPart
    rotary: Rotary
    attention: AttentionBackend
    call: AttentionCall
    keep: Keep
    store: HostStore | None = None
    tile: int = TILE

    def tiles(self, tokens: int) -> list[tuple[slice, LayerCall]]:
        """The rows computed at a time, each with the call for them alone, whose parts know where they begin."""
        if self.keep == "all":
            return [(slice(0, tokens), self)]
        rows = [slice(start, min(start + self.tile, tokens)) for start in range(0, tokens, self.tile)]
        return [(part, self._at(part)) for part in rows]

    def _at(self, rows: slice) -> LayerCall:
        rotary = Rotary(self.rotary.cos[rows], self.rotary.sin[rows], self.rotary.width)
        parts = dict(input=self.input.at(rows.start), middle=self.middle.at(rows.start))
        return replace(self, **parts, mlp=self.mlp.at(rows.start), rotary=rotary)


class FusedLayer(torch.autograd.Function):
    """x (B, S, H) -> y (B, S, H), with gradients for x and the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LayerCall, *_: Tensor | None) -> Tensor:
        """The factors are listed for autograd and read from the parts."""
        flat = x.reshape(-1, x.shape[-1])
        heads = _project_in(flat, layer)
        attended, kept = layer.attention.forward(*_split(heads[0], layer), layer.call)
        out = torch.empty_like(flat)
        ctx.layer, ctx.num_kept = layer, len(kept)
        if layer.keep == "all":
            tail = halves.tail(flat, _by_token(attended), layer.middle, layer.mlp, out)[1:]
            ctx.save_for_backward(flat, attended, *kept, *heads, *tail)
            return halves.shaped(out, x)
        saved: tuple[Tensor, ...] = (flat,) if layer.keep == "input" else (flat, attended, *kept)
        if layer.keep == "projected":
            ctx.has_heads = [part is not None for part in heads]
            saved += tuple(part for part in heads if part is not None)
        del heads
        tails, keep_sum = [], layer.keep == "projected" and layer.middle.post is None
        for rows, part in layer.tiles(flat.shape[0]):
            tail = halves.tail(flat[rows], _by_token(attended)[rows], part.middle, part.mlp, out[rows])
            tails.append((tail.raw, tail.s if keep_sum else None))
            del tail
        raw, s = (None if found[0] is None else _joined(found) for found in zip(*tails, strict=True))
        del tails
        ctx.has_sum = s is not None
        saved += () if s is None else (s,)
        if layer.store is not None:
            ctx.stored = layer.store.put(*saved)
            saved = ()
        ctx.save_for_backward(raw, *saved)
        return halves.shaped(out, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x and of the factors, in the order they were listed."""
        layer: LayerCall = ctx.layer
        flat_dy = _flat_gradient(dy, layer)
        if layer.keep == "all":
            flat, attended, *rest = ctx.saved_tensors
            kept, heads, tail = rest[: ctx.num_kept], rest[ctx.num_kept : -7], rest[-7:]
            raw = s = None
        else:
            raw, *rest = ctx.saved_tensors
            s = None
            flat, *rest = ctx.stored.get() if layer.store is not None else rest
            tail: list[Any] | None = None
            heads: Any = None
            if layer.keep == "input":
                heads = _project_in(flat, layer)
                attended, kept = layer.attention.forward(*_split(heads[0], layer), layer.call)
            else:
                if ctx.has_sum:
                    s = rest.pop()
                attended, *rest = rest
                kept, rest = rest[: ctx.num_kept], iter(rest[ctx.num_kept :])
                if layer.keep == "projected":
                    heads = tuple(next(rest) if there else None for there in ctx.has_heads)
        dx, dattended, late = _tail_backward(flat_dy, flat, _by_token(attended), layer, tail, (raw, s))
        del tail, s
        heads = heads or _project_in(flat, layer)
        dout = dattended.view(attended.shape)
        grads = layer.attention.backward(dout, *_split(heads[0], layer), attended, tuple(kept), layer.call)
        kept_in = (heads[1], heads[2])
        del heads, dattended, attended
        residual = dx if ctx.needs_input_grad[0] else None
        grad, early = _project_in_backward(grads, residual, flat, layer, kept_in)
        if grad is None:
            return None, None, *early, *late
        dx = grad[:, : flat.shape[1]].view(dy.shape)
        setattr(dx, _WIDENED, grad)
        return dx, None, *early, *late


# A gradient that a layer returns knows the wider memory it lies in, which the layer before it completes: see ``Stack``.
_WIDENED = "_pantheraml_widened"


def _flat_gradient(dy: Tensor, layer: LayerCall) -> Tensor:
    """dy (B, S, H) as (T, H), or as (T, H + E) where the room for down's margin is there already."""
    wide: Tensor | None = getattr(dy, _WIDENED, None)
    size = (dy.shape[:-1].numel(), dy.shape[-1] + layer.mlp.down.room)
    if wide is not None and wide.shape == size and wide.data_ptr() == dy.data_ptr():
        return wide
    flat = dy.reshape(-1, dy.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Sum:
    """Factor gradients of all tiles; those of several are added up in float32 and rounded once."""

    def __init__(self) -> None:
        self._total: Gradients = []
        self._dtypes: list[torch.dtype | None] = []

    def add(self, part: Gradients) -> None:
        """Those of one more tile."""
        if not self._dtypes:
            self._total, self._dtypes = part, [None if one is None else one.dtype for one in part]
            return
        pairs = zip(self._total, part, strict=True)
        self._total = [
            None if a is None or b is None else (a.float() if a.itemsize < 4 else a).add_(b) for a, b in pairs
        ]

    def total(self) -> Gradients:
        """All of them, in the dtype that they came in."""
        pairs = zip(self._total, self._dtypes, strict=True)
        return [None if one is None or dtype is None else one.to(dtype) for one, dtype in pairs]


def _by_token(attended: Tensor) -> Tensor:
    """(B, S, heads, D) as (T, heads * D)."""
    return attended.reshape(attended.shape[0] * attended.shape[1], -1)


def _project_in(x: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q, k and v side by side (T, …); the sums before the head norms; and t."""
    if layer.keep == "all":
        return halves.project_in(x, layer.input, layer.rotary)
    tiles = layer.tiles(x.shape[0])
    parts = [halves.project_in(x[rows], part.input, part.rotary) for rows, part in tiles]
    if len(parts) == 1:
        return parts[0]
    raw = None if parts[0].raw is None else torch.cat([part.raw for part in parts if part.raw is not None])
    t = None if parts[0].t is None else torch.cat([part.t for part in parts if part.t is not None])
    return torch.cat([part.qkv for part in parts]), raw, t


def _split(qkv: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (B, S, heads, D)."""
    call = layer.call
    q, k, v = (
        part.view(call.rows, call.tokens, -1, call.head_dim)
        for part in qkv.split_with_sizes(layer.input.widths, 1)
    )
    return q, k, v


def _tail_backward(
    dy: Tensor,
    x: Tensor,
    attended: Tensor,
    layer: LayerCall,
    tail: list[Tensor | None] | None,
    kept: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Gradients]:
    """Gradients of x (by the residual), of what was attended, and of the factors of o, gate, up and down.

    Without a ``tail`` it is computed again, from what was ``kept`` of it: down's product before its norm, and s.
    """
    if tail is not None:
        return halves.tail_backward(dy, attended, layer.middle, layer.mlp, tail)
    found, factors = [], _Sum()
    for rows, part in layer.tiles(x.shape[0]):
        raw, s = (None if tensor is None else tensor[rows] for tensor in kept)
        again = halves.tail_again(x[rows], attended[rows], s, part.middle, part.mlp, raw)
        *grads, of_factors = halves.tail_backward(
            dy[rows], attended[rows], part.middle, part.mlp, again, in_place=True
        )
        found.append(grads)
        factors.add(of_factors)
        del again, of_factors
    dx, dattended = zip(*found, strict=True)
    return _joined(dx), _joined(dattended), factors.total()


def _project_in_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    residual: Tensor | None,
    x: Tensor,
    layer: LayerCall,
    kept: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Gradients]:
    """The gradient of x, with room for the margin of the layer before (taken to be as this one's), and those of the
    factors of q, k and v; ``kept`` is raw and t.
    """
    dq, dk, dv = (grad.flatten(0, 1) for grad in grads)
    wide = layer.mlp.down.widened(x, x.shape[1]) if residual is not None else None
    factors = _Sum()
    for rows, part in layer.tiles(x.shape[0]):
        found = halves.project_in_backward(
            (dq[rows], dk[rows], dv[rows]),
            None if residual is None else residual[rows],
            x[rows],
            part.input,
            part.rotary,
            (None if kept[0] is None else kept[0][rows], None if kept[1] is None else kept[1][rows]),
            None if wide is None else wide[rows, : x.shape[1]],
        )
        factors.add(found)
        del found
    return wide, factors.total()
