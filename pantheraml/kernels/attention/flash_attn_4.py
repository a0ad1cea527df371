"""FlashAttention 4 (the package ``flash-attn-4``, extra ``hopper``): kernels in Python that compile themselves.

Half precision, dense and packed rows, grouped heads, windows, soft-caps; Hopper and newer. The first call
of a kind compiles for some seconds; lengths are not compiled in. Tri Dao and others, BSD.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionCall, Kept, why_no_flash, why_not_repeatable
from pantheraml.kernels.attention.package import ABSENT, functions, why_absent
from pantheraml.kernels.attention.probe import failure

_FUNCTIONS = "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"


class FlashAttn4:
    """``flash_attn.cute`` without its autograd Functions."""

    name = "flash-attn-4"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs the package, Hopper or newer, half precision and heads of 8, 16, ... 256 numbers."""
        reason = why_no_flash(call) or why_not_repeatable()
        if reason is None and torch.cuda.get_device_capability(call.device) < (9, 0):
            reason = "has a backward for Hopper and newer only"
        if reason is None:
            reason = why_absent(*_FUNCTIONS) or failure(self, call.features)
        return f"{ABSENT} (pip install 'pantheraml[hopper]')" if reason == ABSENT else reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        forward, _ = functions(*_FUNCTIONS)
        heads = (t.detach() for t in call.tokens_of(q, k, v))
        with torch.cuda.device_of(q):
            out, lse, *_ = forward(*heads, return_lse=True, **_options(call))
        return call.rows_of(out)[0], (lse,)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        _, backward = functions(*_FUNCTIONS)
        dout, q, k, v, out = (t.detach() for t in call.tokens_of(dout, q, k, v, out))
        with torch.cuda.device_of(q):
            dq, dk, dv, *_ = backward(q, k, v, out, dout, kept[0], **_options(call))
        dq, dk, dv = call.rows_of(dq, dk, dv)
        return dq, dk, dv


def _options(call: AttentionCall) -> dict[str, Any]:
    """Keyword arguments that the forward and the backward share."""
    options: dict[str, Any] = {
        "softmax_scale": call.scale,
        "causal": call.window is None,
        "softcap": call.softcap or 0.0,
        "window_size_left": None if call.window is None else call.window - 1,
        "window_size_right": None if call.window is None else 0,
    }
    if call.packed:
        offsets, longest = call.offsets
        options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return options
