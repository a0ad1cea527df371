"""FlashAttention 2 of the package ``flash-attn``, where it is installed: the kernels torch has, and soft-caps.

bfloat16 and float16, dense and packed rows, grouped heads, windows. Tri Dao and others, BSD.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionCall, Kept, why_no_flash
from pantheraml.kernels.attention.package import functions, why_absent
from pantheraml.kernels.attention.probe import failure

_MODULE = "flash_attn.flash_attn_interface"
_DENSE = _MODULE, "_flash_attn_forward", "_flash_attn_backward"
_PACKED = _MODULE, "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"


class FlashAttn2:
    """The package's operators without its autograd Functions."""

    name = "flash-attn-2"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs the package, half precision and heads of 8, 16, ... 256 numbers."""
        reason = why_no_flash(call)
        if reason is None:
            reason = why_absent(*(_PACKED if call.packed else _DENSE)) or failure(self, call.features)
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        forward, _ = functions(*(_PACKED if call.packed else _DENSE))
        heads = (t.detach() for t in call.tokens_of(q, k, v))
        out, lse, *_ = forward(*heads, return_softmax=False, **_options(call))
        return call.rows_of(out)[0], (lse,)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        _, backward = functions(*(_PACKED if call.packed else _DENSE))
        dout, q, k, v, out = (t.detach() for t in call.tokens_of(dout, q, k, v, out))
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        tensors = dout, q, k, v, out, kept[0], dq, dk, dv
        in_order = torch.are_deterministic_algorithms_enabled()
        backward(*tensors, deterministic=in_order, rng_state=None, **_options(call))
        dq, dk, dv = call.rows_of(dq, dk, dv)
        return dq, dk, dv


def _options(call: AttentionCall) -> dict[str, Any]:
    """Keyword arguments that the forward and the backward share."""
    options: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": call.scale,
        "causal": call.window is None,
        "window_size_left": -1 if call.window is None else call.window - 1,
        "window_size_right": -1 if call.window is None else 0,
        "softcap": call.softcap or 0.0,
        "alibi_slopes": None,
    }
    if call.packed:
        offsets, longest = call.offsets
        options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return options
