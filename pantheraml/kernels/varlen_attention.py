"""Causal attention over rows that hold several documents: each token sees its own document only.

Shapes: query (B, S, H, D), key and value (B, S, K, D) with K a divisor of H. Documents are given by
position ids that restart: where ``position[i] != position[i - 1] + 1`` a document begins, and so does
every row. On a GPU ``torch.nn.attention.varlen`` computes them without a mask; elsewhere a mask of
shape (B, 1, S, S) keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

Attend = Callable[..., Tensor]
F = TypeVar("F", bound=Callable[..., Any])


class Layout:
    """How the documents of one batch lie in its rows; masks are built once, when asked for.

    Attributes:
        shape: (B, S).
        cu_seqlens: where documents begin among the B * S tokens and, last, B * S: (documents + 1,) int32 on
            the device; None when every row is one document.
        max_seqlen: tokens of the longest document.
    """

    def __init__(
        self, shape: tuple[int, int], device: torch.device, cu_seqlens: Tensor | None, max_seqlen: int
    ):
        self.shape, self.device = shape, device
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None = None) -> Tensor:
        """True where a token may look: (B, 1, S, S) bool, (1, 1, S, S) without documents.

        Args:
            window: how many tokens back it may look, itself included; None for all.
        """
        if window not in self._masks:
            rows, length = self.shape
            back = torch.arange(length, device=self.device)
            back = back[:, None] - back[None, :]
            mask = back >= 0 if window is None else (back >= 0) & (back < window)
            mask = mask[None]
            if self.cu_seqlens is not None:
                token = torch.arange(rows * length, device=self.device, dtype=torch.int32)
                document = torch.bucketize(token, self.cu_seqlens[1:], right=True).view(rows, length)
                mask = mask & (document[:, :, None] == document[:, None, :])
            self._masks[window] = mask[:, None]
        return self._masks[window]


# One layout per batch: every layer is called with the same tensor of positions.
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _eagerly(function: F) -> F:
    """Keep ``function`` out of compiled graphs; ``torch.compiler.disable`` with the signature kept."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@_eagerly
def read_layout(
    shape: tuple[int, int],
    device: torch.device,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Layout:
    """The layout of a batch of ``shape`` (B, S).

    Args:
        shape: rows and tokens per row.
        device: where masks and offsets are wanted.
        position_ids: (B, S) or (1, S) integers; None means every row is one document. Reading them waits
            for the device, once per batch.
        cu_seqlens: the document offsets, if a collator of one row has them already; no waiting then.
        max_seqlen: given together with ``cu_seqlens``.
    """
    given = shape[0] == 1 and cu_seqlens is not None and max_seqlen is not None
    source = cu_seqlens if given else position_ids
    if source is None or source.ndim != (1 if given else 2):
        return Layout(shape, device, None, shape[1])
    # A tensor made under inference_mode does not count its changes, so it is read each time.
    version = None if source.is_inference() else source._version
    kept = _layouts.get(source)
    if kept is not None and version is not None and kept[:2] == (version, shape):
        return kept[2]
    if cu_seqlens is not None and max_seqlen is not None and given:
        offsets, longest = cu_seqlens.clone(), max_seqlen  # a kept layout must not keep its own key alive
    else:
        offsets, longest = _find_documents(source.expand(shape))
    if offsets.numel() > shape[0] + 1:
        layout = Layout(shape, device, offsets.to(device=device, dtype=torch.int32), longest)
    else:
        layout = Layout(shape, device, None, shape[1])
    _layouts[source] = (version, shape, layout)
    return layout


def _find_documents(positions: Tensor) -> tuple[Tensor, int]:
    """Document offsets among the tokens of ``positions`` (B, S), on the CPU, and the longest length."""
    begins = torch.ones(positions.shape, dtype=torch.bool, device=positions.device)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = begins.flatten().cpu().nonzero().flatten()
    offsets = torch.cat([starts, torch.tensor([positions.numel()])])
    return offsets, int(offsets.diff().max()) if positions.numel() else 0


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each document of ``layout``, without a mask.

    Args:
        query: (B, S, H, D) bfloat16 or float16 on a GPU.
        key: (B, S, K, D).
        value: (B, S, K, D).
        layout: with ``cu_seqlens``.
        scale: of the logits; None for 1 / sqrt(D).
        window: how many tokens back a token may look, itself included; None for all.

    Returns:
        (B, S, H, D).
    """
    attend = _probe(query.device)
    assert not isinstance(attend, str) and layout.cu_seqlens is not None, attend
    flat = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
    out = attend(*flat, layout.cu_seqlens, layout.max_seqlen, scale, window)
    return out.view(query.shape)


def why_no_varlen(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why ``varlen_attention`` cannot take these tensors, or None when it can."""
    if query.device.type != "cuda":
        return "attention without a mask needs a GPU"
    if {query.dtype, key.dtype, value.dtype} not in ({torch.bfloat16}, {torch.float16}):
        return f"attention without a mask computes in bfloat16 or float16, not in {query.dtype}"
    head_dim = query.shape[-1]
    if head_dim > 256 or head_dim % 8 or value.shape[-1] != head_dim:
        return f"attention without a mask takes heads of 8, 16, ... 256 numbers, not {head_dim}"
    found = _probe(query.device)
    return found if isinstance(found, str) else None


def _call(way: tuple[dict[str, Any], bool], q, k, v, cu_seqlens, max_seqlen, scale, window) -> Tensor:
    """torch's operator on flat heads (tokens, H or K, D); ``way``: its options, and whether to repeat heads."""
    from torch.nn.attention.varlen import varlen_attn

    options, repeat = way
    if repeat:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    reach = (-1 if window is None else window - 1, 0)
    offsets = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *offsets, scale=scale, window_size=reach, **options)
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=16)
def _probe(device: torch.device) -> Attend | str:
    """The way to call torch's operator that gives right numbers on ``device``, or why none does."""
    reasons = []
    # Versions of torch differ in how they take grouped heads: when told, unasked, or not at all.
    for way in (({"enable_gqa": True}, False), ({}, False), ({}, True)):
        attend = partial(_call, way)
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                if _is_right(attend, device):
                    return attend
            reasons.append("wrong numbers")
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return f"torch's varlen attention does not work on {device} ({'; '.join(dict.fromkeys(reasons))})"


def _is_right(attend: Attend, device: torch.device) -> bool:
    """Whether ``attend`` agrees with SDPA on two documents, forward and backward, with and without window."""
    generator = torch.Generator().manual_seed(0)
    shapes = (16, 4, 32), (16, 2, 32), (16, 2, 32), (16, 4, 32)
    *inputs, dy = (torch.randn(shape, generator=generator).to(device, torch.float16) for shape in shapes)
    layout = Layout((1, 16), device, torch.tensor([0, 5, 16], dtype=torch.int32, device=device), 11)

    def differentiate(function: Attend) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        return [t.float() for t in (out, *torch.autograd.grad(out, leaves, dy.to(out.dtype)))]

    def masked(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        q, k, v = (t.float()[None].transpose(1, 2) for t in (q, k, v))
        mask = layout.mask(window)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True)
        return out.transpose(1, 2)[0]

    for window in (None, 3):
        ours = differentiate(lambda q, k, v, w=window: attend(q, k, v, layout.cu_seqlens, 11, 0.2, w))
        right = differentiate(lambda q, k, v, w=window: masked(q, k, v, w))
        if not all(torch.allclose(a, b, atol=2e-2, rtol=2e-2) for a, b in zip(ours, right, strict=True)):
            return False
    return True
