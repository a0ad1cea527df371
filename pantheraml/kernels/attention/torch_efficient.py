"""torch's memory-efficient attention (from xformers): float32 too, GPUs before Ampere, packed rows, windows.

``aten::_efficient_attention_forward`` knows no grouped heads, so keys and values are repeated. Its lse is
padded, (documents or B, H, longest up to a multiple of 32), and is brought to the common form and back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pantheraml.kernels.attention.backend import AttentionCall, Kept
from pantheraml.kernels.attention.probe import failure

CAUSAL = 1  # of xformers' kinds of masks: from the top left corner of each document


class TorchEfficient:
    """One kernel for dense rows and, as one row with offsets, packed ones."""

    name = "torch-efficient"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs a GPU; no soft-cap; heads of a multiple of 8 numbers (4 in float32)."""
        if call.device.type != "cuda":
            return "needs a GPU"
        if call.dtype == torch.float64:
            return "computes in float32 and half precision, not in torch.float64"
        if call.softcap is not None:
            return "has no soft-cap"
        multiple = 4 if call.dtype == torch.float32 else 8
        if call.head_dim % multiple:
            return f"takes heads of a multiple of {multiple} numbers, not {call.head_dim}"
        return failure(self, call.features)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        q, k, v = _in_one_row(call, q, _repeat(k, call), _repeat(v, call))
        offsets, longest = call.offsets
        lengths = offsets, offsets, longest, longest
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, *lengths, 0.0, CAUSAL, True, scale=call.scale, window_size=call.window
        )
        return call.rows_of(out[0])[0] if call.packed else out, (_to_tokens(lse, call),)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        flat = _in_one_row(call, dout, q, _repeat(k, call), _repeat(v, call))
        offsets, longest = call.offsets
        lengths = offsets, offsets, longest, longest
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of a dropout of 0
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            *flat,
            None,
            *_in_one_row(call, out),
            *lengths,
            _to_documents(kept[0], call),
            0.0,
            unused,
            unused,
            CAUSAL,
            False,
            scale=call.scale,
            window_size=call.window,
        )
        dk, dv = (
            t.view(call.rows, call.tokens, call.kv_heads, call.groups, -1).sum(3).to(q.dtype)
            for t in (dk, dv)
        )
        return dq.view(q.shape), dk, dv


def _repeat(x: Tensor, call: AttentionCall) -> Tensor:
    """(B, S, K, D) as (B, S, H, D), copied where H is more than K."""
    return x if call.groups == 1 else x.repeat_interleave(call.groups, dim=2)


def _in_one_row(call: AttentionCall, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(1, B * S, H, D) for packed rows, contiguous for all."""
    return tuple((t.reshape(1, -1, *t.shape[2:]) if call.packed else t).contiguous() for t in tensors)


def _places(call: AttentionCall) -> tuple[Tensor, Tensor, int]:
    """Each token's document and place in it, (B * S,), and how many documents there are."""
    offsets = call.offsets[0]
    assert offsets is not None
    token = torch.arange(call.rows * call.tokens, device=call.device, dtype=offsets.dtype)
    document = torch.bucketize(token, offsets[1:], right=True)
    return document, token - offsets[document], len(offsets) - 1


def _to_tokens(lse: Tensor, call: AttentionCall) -> Tensor:
    """The kernel's lse as (B, H, S), or (H, B * S) for packed rows."""
    if not call.packed:
        return lse[..., : call.tokens]
    document, place, _ = _places(call)
    return lse[document, :, place].t()


def _to_documents(lse: Tensor, call: AttentionCall) -> Tensor:
    """What ``_to_tokens`` did, undone; inf where there is no token."""
    longest = call.offsets[1]
    padded = -(-longest // 32) * 32
    if not call.packed:
        return functional.pad(lse, (0, padded - longest), value=float("inf"))
    document, place, count = _places(call)
    full = lse.new_full((count, call.heads, padded), float("inf"))
    full[document, :, place] = lse.t()
    return full
