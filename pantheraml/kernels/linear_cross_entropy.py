"""Log-probabilities of the next tokens straight from the hidden states, gradients included, logits never kept.

Shapes: h (T, H) hidden states of the labelled positions, W (V, H) the head, labels (T,).

    z_i    = h_i W^T
    logp_i and entropy_i of z_i with scale and soft-cap: see cross_entropy
    d_i    = d logp_i / d z_i
    dh_i   = g_i * d_i W               g_i: the gradient of logp_i that comes from above
    dW     = sum_i g_i * d_i^T h_i

Logits exist for a chunk of rows at a time. Which products with W are made depends on what is trained:

- A frozen head. dh_i is a fixed vector times g_i, so it is made in the forward while the logits are there, and the
  backward only scales it: two products in all. The vector is kept in float32, so that it is rounded once.
- A trained head. dW adds up rows whose g_i the forward does not know and may differ (a label may be weighted, a row
  clipped), so no sum made in the forward would be right for every loss. The backward makes the logits of a chunk
  again, turns them into g_i * d_i and multiplies twice: four products, exact whatever comes from above. dW is summed
  over the chunks in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.errors import ConfigError
from pantheraml.kernels.accumulate import add_product, write_product
from pantheraml.kernels.cross_entropy import gradient_rows, score_rows
from pantheraml.kernels.launch import launching_on

# Logits that exist at a time, in elements: 2,048 rows of a vocabulary of 128,256.
_CHUNK_ELEMENTS = 2048 * 128256


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


def _chunks(h: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    return (slice(start, start + rows) for start in range(0, h.shape[0], rows))


def _power_of_two(x: Tensor) -> Tensor:
    """The largest power of two up to x (float32, one number), at least 2^-126: dividing by it rounds nothing."""
    exponent = x.clamp(min=torch.finfo(torch.float32).tiny).view(torch.int32) & 0x7F800000
    return exponent.view(torch.float32)


@torch.library.custom_op("pantheraml::linear_log_probs", mutates_args=())
def _linear_log_probs(
    h: Tensor, weight: Tensor, labels: Tensor, scale: float, softcap: float | None, with_dh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_probs, entropy, is_top1, (top, log_sum) (2, T), d logp / d h (T, H) float32, (0,) unless ``with_dh``."""
    log_probs, entropy, is_top1 = (
        torch.empty(h.shape[0], dtype=torch.float32, device=h.device) for _ in range(3)
    )
    sums = torch.empty((2, h.shape[0]), dtype=torch.float32, device=h.device)
    dh = torch.empty(h.shape if with_dh else (0,), dtype=torch.float32, device=h.device)
    with launching_on(h), torch.autocast(h.device.type, enabled=False):
        w = weight.to(h.dtype)
        for part in _chunks(h, w):
            z = h[part] @ w.T
            scores = score_rows(z, labels[part], scale, softcap, gradient=with_dh)
            for whole, piece in zip((log_probs, *sums, entropy, is_top1), scores, strict=True):
                whole[part] = piece
            if with_dh:
                write_product(dh[part], z, w)
            del z  # before the next one is made
    return log_probs, entropy, is_top1, sums, dh


@_linear_log_probs.register_fake
def _(
    h: Tensor, weight: Tensor, labels: Tensor, scale: float, softcap: float | None, with_dh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_probs, entropy, is_top1 = (h.new_empty(h.shape[:1], dtype=torch.float32) for _ in range(3))
    sums = h.new_empty((2, h.shape[0]), dtype=torch.float32)
    dh = torch.empty(h.shape if with_dh else (0,), dtype=torch.float32, device=h.device)
    return log_probs, entropy, is_top1, sums, dh


@torch.library.custom_op("pantheraml::linear_log_probs_backward", mutates_args=())
def _linear_log_probs_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    sums: Tensor,
    scale: float,
    softcap: float | None,
    with_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dh like h, and dW like weight, (0,) unless ``with_dw``."""
    dh = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    total = torch.zeros(weight.shape if with_dw else (0,), dtype=torch.float32, device=h.device)
    if h.shape[0] == 0:
        return dh.to(h.dtype), total.to(weight.dtype)
    # g is 1 / labels of a step or less. Divided by a power of two, g * d does not fall below what float16 holds.
    size = _power_of_two(g.abs().max())
    g = g / size
    with launching_on(h), torch.autocast(h.device.type, enabled=False):
        w = weight.to(h.dtype)
        for part in _chunks(h, w):
            z = h[part] @ w.T
            gradient_rows(z, z, labels[part], (sums[0, part], sums[1, part]), g[part], scale, softcap)
            write_product(dh[part], z, w)
            if with_dw:
                add_product(total, z.T, h[part])
            del z
    return dh.mul_(size).to(h.dtype), total.mul_(size).to(weight.dtype)


@_linear_log_probs_backward.register_fake
def _(
    g: Tensor,
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    sums: Tensor,
    scale: float,
    softcap: float | None,
    with_dw: bool,
) -> tuple[Tensor, Tensor]:
    dw = torch.empty(weight.shape if with_dw else (0,), dtype=weight.dtype, device=h.device)
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), dw


def _keep(ctx, inputs, output) -> None:
    h, weight, labels, *ctx.options, with_dh = inputs
    _, entropy, is_top1, sums, dh = output
    ctx.mark_non_differentiable(entropy, is_top1, sums, dh)
    ctx.dtype = h.dtype
    ctx.made = with_dh and not ctx.needs_input_grad[1]
    ctx.save_for_backward(*((dh,) if ctx.made else (h, weight, labels, sums)))


def _differentiate(ctx, g: Tensor, *_: Tensor | None):
    dw = None
    if ctx.made:
        (dh,) = ctx.saved_tensors
        dh = (dh * g[:, None]).to(ctx.dtype)
    else:
        trained = ctx.needs_input_grad[1]
        dh, dw = _linear_log_probs_backward(g, *ctx.saved_tensors, *ctx.options, trained)
        dw = dw if trained else None
    return dh, dw, None, None, None, None


_linear_log_probs.register_autograd(_differentiate, setup_context=_keep)


def linear_log_probs(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> TokenScores:
    """Scores of ``labels`` under ``softmax(softcap(scale * h weight^T))``.

    Args:
        h: (T, H).
        weight: (V, H), frozen or trained; a head with a bias is not covered.
        labels: (T,) int64, each a token id: leave unlabelled rows out. On a GPU -100 scores 0 and any other number
            that is no token NaN.
        scale: of the logits.
        softcap: Gemma's bound on the scaled logits, or None.
        dtype: what the products are computed in; None for that of ``weight``. dW is summed in float32 and has the
            dtype of ``weight``.

    Returns:
        The scores; with no rows they are empty.

    Raises:
        ConfigError: the shapes do not fit.
    """
    if h.ndim != 2 or weight.shape[1:] != h.shape[1:] or labels.shape != h.shape[:1]:
        raise ConfigError(
            got=f"h {tuple(h.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)}.",
            need="They are (T, H), (V, H) and (T,).",
            fix="Flatten the batch: h.view(-1, h.shape[-1]) and labels.view(-1).",
        )
    h = h.to(dtype or weight.dtype)
    with_dh = h.requires_grad and not weight.requires_grad and torch.is_grad_enabled()
    log_probs, entropy, is_top1, _, _ = _linear_log_probs(
        h.contiguous(), weight, labels.contiguous(), scale, softcap, with_dh
    )
    return TokenScores(log_probs, entropy, is_top1)
