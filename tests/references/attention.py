"""Causal attention by autograd in the dtype of its inputs: stock PyTorch, and in float64 the exact one."""

from __future__ import annotations

import torch
from torch.nn import functional

from pantheraml.kernels.attention import Layout


def attention(q, k, v, sinks, call):
    """q (B, S, H, D), k and v (B, S, K, D), sinks (H,) or None: the sink is one more column of the softmax."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(call.groups, 1) for t in (k, v))
    z = q @ k.mT * call.scale
    if call.softcap:
        z = call.softcap * torch.tanh(z / call.softcap)
    layout = call.layout or Layout((call.rows, call.tokens), q.device, None, call.tokens)
    z = z.masked_fill(~layout.mask(call.window), float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.to(z.dtype).view(1, -1, 1, 1).expand(*z.shape[:3], 1)], -1)
    p = functional.softmax(z, -1)[..., : call.tokens]
    return (p @ v).transpose(1, 2)


def results(function, q, k, v, dout, sinks):
    """[output, dq, dk, dv] and, with sinks, their gradient; ``function`` takes q, k, v and sinks."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, sinks) if t is not None]
    out = function(*leaves[:3], leaves[3] if sinks is not None else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
