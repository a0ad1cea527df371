"""A learned logit per head that takes part in the softmax and has no value (gpt_oss).

With lse and out of attention without it, s the logit (H,):

    lse' = log (exp(lse) + exp(s)),  out' = out * exp(lse - lse')
    ds   = - sum_i exp(s - lse'[i]) * (dout[i] . out'[i])

and dq, dk, dv are what any flash backward computes from out' and lse': it forms exp(z - lse') and
subtracts dout . out' itself. So every kernel that returns lse has sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionCall


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor, call: AttentionCall) -> None:
    """Change ``out`` (B, S, H, D) and ``lse`` in place; ``sinks`` (H,), any float dtype."""
    plain = call.per_token(lse)
    whole = torch.logaddexp(plain, sinks.to(plain.dtype))
    out.mul_((plain - whole).exp_()[..., None])
    plain.copy_(whole)


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, call: AttentionCall) -> Tensor:
    """ds (H,) of the dtype of ``sinks``, from out' and lse'."""
    whole = call.per_token(lse)
    share = (sinks.to(whole.dtype) - whole).exp_()
    dot = (dout.to(whole.dtype) * out.to(whole.dtype)).sum(-1)
    return -(share * dot).sum((0, 1)).to(sinks.dtype)
