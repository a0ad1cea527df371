"""FlashAttention 3 where somebody built it (module ``flash_attn_interface``): Hopper, half precision.

Dense and packed rows, grouped heads, windows, soft-caps. There are no wheels of it. Tri Dao and others, BSD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionCall, Kept, why_no_flash, why_not_repeatable
from pantheraml.kernels.attention.package import functions, why_absent
from pantheraml.kernels.attention.probe import failure

_FUNCTIONS = "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"


class FlashAttn3:
    """The package's operators without its autograd Functions."""

    name = "flash-attn-3"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs the package, Hopper, half precision and heads of 8, 16, ... 256 numbers."""
        reason = why_no_flash(call) or why_not_repeatable()
        if reason is None and torch.cuda.get_device_capability(call.device)[0] != 9:
            reason = "is for Hopper only"
        if reason is None:
            reason = why_absent(*_FUNCTIONS) or failure(self, call.features)
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        forward, _ = functions(*_FUNCTIONS)
        options = {"softmax_scale": call.scale, "causal": call.window is None, "softcap": call.softcap or 0.0}
        left, right = _window(call)
        if call.packed:
            offsets, longest = call.offsets
            options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        heads = (t.detach() for t in call.tokens_of(q, k, v))
        out, lse, *_ = forward(*heads, window_size_left=left, window_size_right=right, **options)
        return call.rows_of(out)[0], (lse,)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        _, backward = functions(*_FUNCTIONS)
        dout, q, k, v, out = (t.detach() for t in call.tokens_of(dout, q, k, v, out))
        gradients = dq, dk, dv = tuple(t.new_empty(t.shape) for t in (q, k, v))
        offsets, longest = call.offsets
        lengths = (offsets, offsets, None, None, *((longest, longest) if call.packed else (None, None)))
        # by position: releases call the arguments by different names
        backward(
            dout,
            q,
            k,
            v,
            out,
            kept[0],
            *lengths,
            *gradients,
            call.scale,
            call.window is None,
            *_window(call),
            call.softcap or 0.0,
        )
        dq, dk, dv = call.rows_of(dq, dk, dv)
        return dq, dk, dv


def _window(call: AttentionCall) -> tuple[int, int]:
    return (-1, -1) if call.window is None else (call.window - 1, 0)
