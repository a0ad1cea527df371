"""torch's own FlashAttention 2: bfloat16 and float16, dense and packed rows, grouped heads, windows.

``aten::_flash_attention_forward`` and its backward are what SDPA and ``torch.nn.attention.varlen`` call;
their arguments used here have not changed since torch 2.5, while those of ``varlen_attn`` differ from
release to release.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionCall, Kept, why_no_flash
from pantheraml.kernels.attention.probe import failure


class TorchFlash:
    """One kernel for dense rows (B, S, heads, D) and packed ones (B * S, heads, D)."""

    name = "torch-flash"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs half precision and heads of at most 256 numbers; no soft-cap."""
        reason = why_no_flash(call)
        if reason is None and call.softcap is not None:
            reason = "has no soft-cap"
        return reason or failure(self, call.features)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        offsets, longest = call.offsets
        lengths = offsets, offsets, longest, longest
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *call.tokens_of(q, k, v),
            *lengths,
            0.0,
            call.window is None,
            False,
            scale=call.scale,
            **_window(call),
        )
        return call.rows_of(out)[0], (lse,)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        offsets, longest = call.offsets
        lengths = offsets, offsets, longest, longest
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout of 0
        flat = call.tokens_of(dout, q, k, v, out)
        dropout = 0.0, call.window is None, unused, unused  # and whether to be causal
        gradients = torch.ops.aten._flash_attention_backward(
            *flat, kept[0], *lengths, *dropout, scale=call.scale, **_window(call)
        )
        dq, dk, dv = call.rows_of(*gradients)
        return dq, dk, dv


def _window(call: AttentionCall) -> dict[str, int]:
    if call.window is None:
        return {}
    return {"window_size_left": call.window - 1, "window_size_right": 0}
