"""Attention as its formula: for every device, dtype and feature, with (B, H, S, S) numbers in memory.

The last row of the table, what runs on CPU, and in float64 the reference of the probe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionCall, Kept
from pantheraml.kernels.attention.layout import Layout


class Plain:
    """Batched products and a mask, computed in float32; in float64 for float64, and on CPU for float32.

    lse has the dtype computed in.
    """

    name = "plain"

    def why_not(self, call: AttentionCall) -> str | None:
        """Takes everything."""
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        with torch.autocast(q.device.type, enabled=False):
            qg, kg, vg = (_by_key_head(t, call) for t in (q, k, v))
            z, _ = _logits(qg, kg, call)
            return _by_token(z.softmax(-1) @ vg).to(q.dtype), (_pack(z.logsumexp(-1), call),)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        with torch.autocast(q.device.type, enabled=False):
            qg, kg, vg, og, dg = (_by_key_head(t, call) for t in (q, k, v, out, dout))
            z, slope = _logits(qg, kg, call)
            # softmax is more exact than exp(z - lse); the factor is 1 unless lse contains a sink
            p = z.softmax(-1) * (z.logsumexp(-1) - _unpack(kept[0], call)).exp_()[..., None]
            dv = (p.mT @ dg).sum(2, keepdim=True)
            dz = p * (dg @ vg.mT - (dg * og).sum(-1, keepdim=True))
            if slope is not None:
                dz *= slope
            dq, dk = dz @ kg * call.scale, (dz.mT @ qg).sum(2, keepdim=True) * call.scale
        return _by_token(dq).to(q.dtype), _by_token(dk).to(k.dtype), _by_token(dv).to(v.dtype)


def _by_key_head(x: Tensor, call: AttentionCall) -> Tensor:
    """(B, S, H or K, D) as (B, K, G or 1, S, D) in the dtype computed in."""
    double = x.dtype == torch.float64 or (x.dtype == torch.float32 and x.device.type == "cpu")
    wide = torch.float64 if double else torch.float32
    return x.transpose(1, 2).unflatten(1, (call.kv_heads, -1)).to(wide)


def _by_token(x: Tensor) -> Tensor:
    """(B, K, G or 1, S, D) as (B, S, H or K, D), contiguous."""
    return x.flatten(1, 2).transpose(1, 2).contiguous()


def _logits(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """(B, K, G, S, S) logits, -inf where a query may not look, and the slope of the soft-cap."""
    z, slope = q @ k.mT * call.scale, None
    if call.softcap is not None:
        bent = (z / call.softcap).tanh_()
        z, slope = bent * call.softcap, 1 - bent**2
    layout = call.layout or Layout((call.rows, call.tokens), call.device, None, call.tokens)
    return z.masked_fill_(~layout.mask(call.window)[:, None], float("-inf")), slope


def _pack(lse: Tensor, call: AttentionCall) -> Tensor:
    """(B, K, G, S) as (B, H, S), or (H, B * S) for packed rows."""
    lse = lse.flatten(1, 2)
    return lse.transpose(0, 1).flatten(1) if call.packed else lse


def _unpack(lse: Tensor, call: AttentionCall) -> Tensor:
    return call.per_token(lse).transpose(1, 2).unflatten(1, (call.kv_heads, -1))
