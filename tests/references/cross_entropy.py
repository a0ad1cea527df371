"""Scores of labels under given logits in float64, without any rounding in between."""

from __future__ import annotations

import torch

IGNORE = -100


def bent(z, scale=1.0, cap=None):
    """The logits that are meant by raw ones z, in the dtype of z."""
    y = z * scale
    return y if cap is None else cap * torch.tanh(y / cap)


def scores(z, labels, scale=1.0, cap=None):
    """log_probs, entropy and is_top1 of raw logits z (T, V); 0 where the label is -100; (T,) float64."""
    log_p = bent(z.double(), scale, cap).log_softmax(-1)
    counts = labels != IGNORE
    picked = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    is_top1 = picked >= log_p.max(-1).values
    return tuple(torch.where(counts, figure, 0.0) for figure in (picked, entropy, is_top1.double()))
