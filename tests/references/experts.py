"""Grouped products and gated activations in float64, expert by expert."""

from __future__ import annotations

import torch


def spans(ends):
    """(start, end) of each expert."""
    ends = ends.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def rows(x, w, ends, index=None, bias=None, t=None, b=None, scale=1.0):
    """(S, N): ``scale * x[index] W[e]^T + bias[e] + t b[e]^T``."""
    x, w = x.double(), w.double()
    x = x if index is None else x[index.long()]
    parts = []
    for expert, (start, end) in enumerate(spans(ends)):
        part = scale * (x[start:end] @ w[expert].T)
        if t is not None:
            part = part + t[start:end].double() @ b[expert].double().T
        if bias is not None:
            part = part + bias[expert].double()
        parts.append(part)
    return torch.cat(parts)


def outer(left, right, ends):
    """(E, M, N): the sum of ``left[i]^T right[i]`` over each expert's rows."""
    return torch.stack([left[s:e].double().T @ right[s:e].double() for s, e in spans(ends)])


def activation(gu, gate):
    """v (S, I) of gu (S, 2 I); differentiable."""
    gu = gu.double()
    g, u = (gu[:, ::2], gu[:, 1::2]) if gate.in_turn else gu.chunk(2, dim=1)
    if not gate.clamped:
        return g * torch.sigmoid(g) * u
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return (u + 1) * g * torch.sigmoid(gate.alpha * g)
