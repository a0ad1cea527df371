"""cuDNN's attention through aten: dense causal rows in bfloat16 or float16 on Hopper and newer.

Grouped heads are native: keys and values are passed as (B, K, S, D), and so are their gradients.
cuDNN builds a plan for every new shape, which costs more than the faster kernel gains on a shape that
does not come back. So the first ``MOST_SHAPES`` shapes of a process get plans; a run whose lengths vary
more than that (no packing, no padding to a multiple) uses the next backend for all later ones. A shape
never changes sides, so that a recomputed layer takes the backend of its first pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionCall, Kept, why_no_flash, why_not_repeatable
from pantheraml.kernels.attention.probe import PROBED_TOKENS, failure

MOST_SHAPES = 16
_planned: set[tuple] = set()


def _shape(call: AttentionCall) -> tuple:
    return call.rows, call.tokens, call.heads, call.kv_heads, call.head_dim, call.dtype, call.device


class CuDNN:
    """``aten::_scaled_dot_product_cudnn_attention`` and its backward."""

    name = "cudnn"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs half precision, dense rows, no window, no soft-cap, and a GPU it is the faster one on."""
        reason = why_no_flash(call) or why_not_repeatable()
        if reason is not None:
            return reason
        if call.packed:
            return "takes no packed rows"
        if call.softcap is not None:
            return "has no soft-cap"
        if call.window is not None:
            return "has no window"
        if call.tokens < 2:
            return "takes no rows of one token"
        if torch.cuda.get_device_capability(call.device) < (9, 0):
            return "is no faster than FlashAttention before Hopper"
        shape = _shape(call)
        if shape not in _planned and len(_planned) >= MOST_SHAPES:
            return f"has plans for {MOST_SHAPES} other shapes, and a plan costs more than it gains"
        return failure(self, call.features)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, True, False, scale=call.scale
        )
        if call.tokens != PROBED_TOKENS:
            _planned.add(_shape(call))
        return out.transpose(1, 2), (lse.view(call.rows, call.heads, call.tokens),)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        heads = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of a dropout of 0
        lengths = None, None, call.tokens, call.tokens
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads, kept[0].unsqueeze(-1), unused, unused, None, *lengths, 0.0, True, scale=call.scale
        )
        dq, dk, dv = (t.transpose(1, 2) for t in gradients)
        return dq, dk, dv
