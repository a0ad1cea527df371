"""Gated activations in float64, from their definitions."""

from __future__ import annotations

import math

import torch


def activate(g, activation):
    """act(g) float64; differentiable."""
    g = g.double()
    if activation == "silu":
        return g / (1 + torch.exp(-g))
    if activation == "gelu_tanh":
        return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    return 0.5 * g * (1 + torch.erf(g / math.sqrt(2)))


def glu(g, u, activation):
    """act(g) * u."""
    return activate(g, activation) * u.double()
