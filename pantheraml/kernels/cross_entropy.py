"""Cross entropy of given logits, and the kernels over rows of logits that the fused head uses too.

Shapes: z (T, V) raw logits, labels (T,), everything else (T,) float32.

    y_i    = scale * z_i, soft-capped where the model does: cap * tanh(y / cap)
    top_i  = max_v y_iv,   log_sum_i = log sum_v exp(y_iv - top_i),   p_i = exp(y_i - top_i - log_sum_i)
    logp_i = y_i[label_i] - top_i - log_sum_i,   loss_i = -logp_i;   both 0 where label_i is -100
    entropy_i = top_i + log_sum_i - sum_v p_iv y_iv
    d logp_i / d z_i = (onehot(label_i) - p_i) * scale * (1 - (y_i / cap)^2)

One program walks over a row in blocks and keeps its highest logit and the sum of exponentials so far, in float32, so
no row is too long and no tensor of (T, V) is made but the gradient. ``top`` and ``log_sum`` are kept apart: their sum
would be rounded at its own size, which is most of the error of a likely label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.errors import ConfigError
from pantheraml.kernels.elementary import exp, log, product, tanh
from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl

IGNORE = -100
# Measured best on an H200 over 2,048 rows of 128,256.
_BLOCKS = {"BLOCK": 4096, "num_warps": 8}


class RowScores(NamedTuple):
    """Figures of each row of logits, (T,) float32."""

    log_probs: Tensor
    top: Tensor
    log_sum: Tensor
    entropy: Tensor
    is_top1: Tensor


@jit
def _bent(z, scale, cap, CAP: tl.constexpr, EXACT: tl.constexpr):
    """The logits a model means by its raw ones, and the slope from one to the other."""
    y = product(z, scale, EXACT)
    slope = scale
    if CAP:
        value, rise = tanh(tl.div_rn(y, cap), EXACT)
        y = product(cap, value, EXACT)
        slope = scale * rise
    return y, slope


@jit
def _score_kernel(
    z_ptr, z_stride, label_ptr, logp_ptr, top_ptr, log_sum_ptr, entropy_ptr, top1_ptr, cols, scale, cap,
    ignore, CAP: tl.constexpr, FIGURES: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The figures of a row; with GRADIENT, z is then overwritten by d logp / d z."""
    EXACT: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    label = tl.load(label_ptr + row)
    counts = label != ignore
    length = tl.where(counts, cols, 0)  # an ignored row is not read
    highest = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, length, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        y = tl.where(col < cols, _bent(z, scale, cap, CAP, EXACT)[0], -float("inf"))
        top = tl.maximum(highest, tl.max(y, axis=0))
        base = tl.where(top == -float("inf"), 0.0, top)  # nothing but forbidden tokens so far
        shrink = exp(highest - base, EXACT)
        e = exp(y - base, EXACT)
        total = total * shrink + tl.sum(e, axis=0)
        if FIGURES:
            weighted = weighted * shrink + tl.sum(e * tl.where(e > 0, y, 0.0), axis=0)
        highest = top
    total = tl.where(total == 0, 1.0, total)
    highest = tl.where(counts, highest, 0.0)
    log_sum = log(total, EXACT)
    # A label that is no token must not be read; it makes the row NaN.
    known = (label >= 0) & (label < cols)
    raw = tl.load(z_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    of_label = _bent(raw, scale, cap, CAP, EXACT)[0]
    tl.store(logp_ptr + row, tl.where(counts, of_label - highest - log_sum, 0.0))
    tl.store(top_ptr + row, highest)
    tl.store(log_sum_ptr + row, log_sum)
    if FIGURES:
        tl.store(entropy_ptr + row, tl.where(counts, log_sum + (highest - weighted / total), 0.0))
        tl.store(top1_ptr + row, (counts & (of_label >= highest)).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
            y, slope = _bent(z, scale, cap, CAP, EXACT)
            d = (tl.where(col == label, 1.0, 0.0) - exp(y - highest - log_sum, EXACT)) * slope
            tl.store(z_ptr + col, tl.where(counts, d, 0.0).to(z_ptr.dtype.element_ty), mask=col < cols)


@jit
def _gradient_kernel(
    z_ptr, z_stride, d_ptr, label_ptr, top_ptr, log_sum_ptr, g_ptr, cols, scale, cap, ignore,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``g * d logp / d z``, into rows of their own or over z."""
    EXACT: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_ptr + row)
    top = tl.load(top_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    g = tl.load(g_ptr + row)
    z = tl.load(z_ptr + row * z_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    y, slope = _bent(z, scale, cap, CAP, EXACT)
    d = g * (tl.where(col == label, 1.0, 0.0) - exp(y - top - log_sum, EXACT)) * slope
    d = tl.where(label != ignore, d, 0.0)
    tl.store(d_ptr + row * cols + col, d.to(d_ptr.dtype.element_ty), mask=col < cols)


def score_rows(
    z: Tensor,
    labels: Tensor,
    scale: float,
    cap: float | None,
    *,
    figures: bool = True,
    gradient: bool = False,
) -> RowScores:
    """Figures of logits by Triton, or by plain PyTorch where it does not run.

    Args:
        z: (T, V), stride 1 along V; overwritten by d logp / d z with ``gradient``.
        labels: (T,) int64 on the same device: token ids or -100.
        scale: of the logits.
        cap: of the scaled logits, or None.
        figures: also compute entropy and is_top1, which are undefined otherwise.
        gradient: see ``z``.
    """
    if not runs_triton(z):
        return _eager_score(z, labels, scale, cap, gradient)
    rows, cols = z.shape
    scores = RowScores(*torch.empty((5, rows), dtype=torch.float32, device=z.device))
    if rows:
        _score_kernel[(rows,)](
            z, z.stride(0), labels, *scores, cols, scale, cap or 1.0, IGNORE,
            CAP=cap is not None, FIGURES=figures, GRADIENT=gradient, **_BLOCKS,
        )  # fmt: skip
    return scores


def gradient_rows(
    out: Tensor,
    z: Tensor,
    labels: Tensor,
    sums: tuple[Tensor, Tensor],
    g: Tensor,
    scale: float,
    cap: float | None,
) -> None:
    """Write ``g * d logp / d z`` (T, V) to ``out``.

    Args:
        out: (T, V) contiguous; may be z.
        z: as in ``score_rows``.
        labels: as in ``score_rows``.
        sums: top and log_sum, (T,) each, from ``score_rows``.
        g: (T,) float32, contiguous.
        scale: of the logits.
        cap: of the scaled logits, or None.
    """
    if not runs_triton(z):
        out.copy_(_eager_gradient(z, labels, scale, cap) * g[:, None])
        return
    rows, cols = z.shape
    if rows:
        _gradient_kernel[(rows, -(-cols // _BLOCKS["BLOCK"]))](
            z, z.stride(0), out, labels, *sums, g, cols, scale, cap or 1.0, IGNORE,
            CAP=cap is not None, **_BLOCKS,
        )  # fmt: skip


def _eager_bent(z: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor | float]:
    y = z.float() * scale
    if cap is None:
        return y, scale
    x = y / cap
    tanh = torch.tanh(x)
    slope = torch.where(x.abs() < 0.625, 1 - tanh * tanh, torch.cosh(x) ** -2)
    return cap * tanh, scale * slope


def _eager_score(z: Tensor, labels: Tensor, scale: float, cap: float | None, gradient: bool) -> RowScores:
    y, slope = _eager_bent(z, scale, cap)
    counts = labels != IGNORE
    log_p = y.log_softmax(-1)
    log_prob = log_p.gather(-1, labels.masked_fill(~counts, 0)[:, None])[:, 0]
    top = y.max(-1).values
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    is_top1 = (log_prob >= log_p.max(-1).values).float()
    if gradient:
        z.copy_(_eager_slope(log_p, labels, slope))
    figures = (log_prob, top, y.logsumexp(-1) - top, entropy, is_top1)
    return RowScores(*(torch.where(counts, figure, 0.0) for figure in figures))


def _eager_gradient(z: Tensor, labels: Tensor, scale: float, cap: float | None) -> Tensor:
    y, slope = _eager_bent(z, scale, cap)
    return _eager_slope(y.log_softmax(-1), labels, slope)


def _eager_slope(log_p: Tensor, labels: Tensor, slope: Tensor | float) -> Tensor:
    """d logp / d z of logits whose slope by the raw ones is ``slope``."""
    d = -log_p.exp()
    d.scatter_add_(-1, labels[:, None].clamp(min=0), torch.ones_like(d[:, :1]))
    return torch.where((labels != IGNORE)[:, None], d * slope, 0.0)


@torch.library.custom_op("pantheraml::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The losses (T,), and top and log_sum of each row (2, T), which the backward needs."""
    with launching_on(logits):
        scores = score_rows(logits, labels, scale, softcap, figures=False)
    return -scores.log_probs, torch.stack((scores.top, scores.log_sum))


@_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(2, rows, dtype=torch.float32)


@torch.library.custom_op("pantheraml::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, sums: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Into a tensor of its own: the logits belong to the model's caller, who may still read them."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with launching_on(logits):
        gradient_rows(out, logits, labels, (sums[0], sums[1]), -dloss.contiguous(), scale, softcap)
    return out


@_cross_entropy_backward.register_fake
def _(
    dloss: Tensor, logits: Tensor, labels: Tensor, sums: Tensor, scale: float, softcap: float | None
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _keep(ctx, inputs, output) -> None:
    logits, labels, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])
    ctx.options = options


def _differentiate(ctx, dloss: Tensor, _: Tensor | None):
    return _cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options), None, None, None


_cross_entropy.register_autograd(_differentiate, setup_context=_keep)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """``-log softmax(softcap(scale * logits))[label]`` of each row, computed in float32.

    Args:
        logits: (T, V), any floating dtype; the gradient has the same.
        labels: (T,) int64: token ids, or -100 for rows that do not count. On a GPU any other number gives NaN.
        scale: of the logits.
        softcap: bound of the scaled logits, or None.

    Returns:
        (T,) float32, 0 for rows that do not count.

    Raises:
        ConfigError: the shapes do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ConfigError(
            got=f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}.",
            need="Logits are (T, V), labels (T,).",
            fix="Flatten both: logits.view(-1, logits.shape[-1]) and labels.view(-1).",
        )
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    return _cross_entropy(rows, labels.contiguous(), scale, softcap)[0]
