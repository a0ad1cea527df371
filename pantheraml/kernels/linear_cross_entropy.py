"""Log-probabilities of the next tokens straight from the hidden states, gradient included, logits never kept.

Shapes: h (T, H) hidden states of the labelled positions, W (V, H) the frozen head, labels (T,).

    z_i   = scale * h_i W^T, soft-capped where the model does: cap * tanh(z / cap)
    logp_i = z_i[label_i] - logsumexp(z_i)
    entropy_i = logsumexp(z_i) - sum_v p_iv z_iv
    d logp_i / d h_i = scale * ((onehot(label_i) - p_i) * (1 - (z_i / cap)^2)) W

The gradient of one row is a fixed vector times whatever comes from above, so it is made in the forward, while the
logits of a chunk of rows are there, and the backward only scales it: two products with W instead of three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, tl

# Logits that exist at a time, in elements: 2,048 rows of a vocabulary of 128,256.
_CHUNK_ELEMENTS = 2048 * 128256
_BLOCK = 8192


class TokenScores(NamedTuple):
    """Figures of each position, (T,) float32; only ``log_probs`` has a gradient.

    Attributes:
        log_probs: of the label.
        entropy: of the distribution, in nats.
        is_top1: 1.0 where the label is the most likely token.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


@jit
def _score_kernel(
    z_ptr, label_ptr, logp_ptr, entropy_ptr, top1_ptr, cols, scale, cap,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * cols
    label = tl.load(label_ptr + row)
    highest = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + col, mask=col < cols, other=-float("inf")).to(tl.float32) * scale
        if CAP:
            z = tl.where(col < cols, cap * (2 * tl.sigmoid(2 * z / cap) - 1), -float("inf"))
        top = tl.maximum(highest, tl.max(z, axis=0))
        shrink = tl.exp(highest - top)
        e = tl.exp(z - top)
        total = total * shrink + tl.sum(e, axis=0)
        weighted = weighted * shrink + tl.sum(tl.where(col < cols, e * z, 0.0), axis=0)
        highest = top
    lse = highest + tl.log(total)
    of_label = tl.load(z_ptr + label).to(tl.float32) * scale
    if CAP:
        of_label = cap * (2 * tl.sigmoid(2 * of_label / cap) - 1)
    tl.store(logp_ptr + row, of_label - lse)
    tl.store(entropy_ptr + row, lse - weighted / total)
    tl.store(top1_ptr + row, (of_label >= highest).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + col, mask=col < cols, other=-float("inf")).to(tl.float32) * scale
            slope = scale
            if CAP:
                squashed = 2 * tl.sigmoid(2 * z / cap) - 1
                z = cap * squashed
                slope = scale * (1 - squashed * squashed)
            d = (tl.where(col == label, 1.0, 0.0) - tl.exp(z - lse)) * slope
            tl.store(z_ptr + col, d.to(z_ptr.dtype.element_ty), mask=col < cols)


def _score_rows(
    z: Tensor, labels: Tensor, scale: float, cap: float | None, gradient: bool
) -> tuple[Tensor, ...]:
    """log_probs, entropy, is_top1 of logits z (rows, V); z becomes d logp / d z when ``gradient``."""
    if z.device.type != "cuda":
        return _eager_score(z, labels, scale, cap, gradient)
    logp, entropy, top1 = (torch.empty(z.shape[0], dtype=torch.float32, device=z.device) for _ in range(3))
    _score_kernel[(z.shape[0],)](
        z, labels, logp, entropy, top1, z.shape[1], scale, cap or 1.0,
        CAP=cap is not None, GRADIENT=gradient, BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
    return logp, entropy, top1


def _eager_score(
    z: Tensor, labels: Tensor, scale: float, cap: float | None, gradient: bool
) -> tuple[Tensor, ...]:
    raw = z.float() * scale
    y = raw if cap is None else cap * torch.tanh(raw / cap)
    log_p = y.log_softmax(-1)
    p = log_p.exp()
    logp = log_p.gather(-1, labels[:, None])[:, 0]
    entropy = -(p * log_p).sum(-1)
    top1 = (y.gather(-1, labels[:, None])[:, 0] >= y.max(-1).values).float()
    if gradient:
        slope = scale if cap is None else scale * (1 - (y / cap) ** 2)
        d = (torch.zeros_like(p).scatter_(-1, labels[:, None], 1.0) - p) * slope
        z.copy_(d)
    return logp, entropy, top1


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, scale: float, cap: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = ctx.needs_input_grad[0]
        dh = torch.empty_like(h) if gradient else None
        rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        scores: list[tuple[Tensor, ...]] = []
        for start in range(0, h.shape[0], rows):
            part = slice(start, start + rows)
            z = h[part] @ weight.T
            scores.append(_score_rows(z, labels[part], scale, cap, gradient))
            if dh is not None:
                torch.mm(z, weight, out=dh[part])
        logp, entropy, top1 = (
            (torch.cat(parts) for parts in zip(*scores, strict=True))
            if scores
            else (torch.zeros(0, dtype=torch.float32, device=h.device) for _ in range(3))
        )
        ctx.save_for_backward(dh)
        ctx.mark_non_differentiable(entropy, top1)
        return logp, entropy, top1

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor, *_: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dh,) = ctx.saved_tensors
        return (dh.float() * dlogp[:, None]).to(dh.dtype), None, None, None, None


def linear_log_probs(
    h: Tensor, weight: Tensor, labels: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> TokenScores:
    """Scores of ``labels`` under ``softmax(softcap(scale * h weight^T))``.

    Args:
        h: (T, H), the dtype of ``weight``.
        weight: (V, H), frozen.
        labels: (T,) int64, each a token id (no -100).
        scale: of the logits.
        softcap: Gemma's bound on the logits, or None.

    Returns:
        The scores; with no rows they are empty.

    Raises:
        ValueError: ``weight`` requires a gradient, which is not computed here.
    """
    if weight.requires_grad:
        raise ValueError("linear_log_probs computes no gradient of the head; freeze it or use another path")
    with torch.autocast(h.device.type, enabled=False):
        return TokenScores(*_LinearLogProb.apply(h.to(weight.dtype), weight, labels, scale, softcap))
