"""torch's flex_attention, compiled: soft-caps (Gemma 2) where no FlashAttention with them is installed.

Half precision, dense and packed rows, grouped heads, windows. It comes with autograd only, so the backward
runs the forward once more; with sinks the gradient of lse carries what they take (w = exp(lse - lse')):

    gradients of out and lse: w * dout and (1 - w) * (dout . out')

The first calls of a kind compile for half a minute and more, so short rows are left to the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pantheraml.kernels.attention.backend import AttentionCall, Kept, why_no_flash
from pantheraml.kernels.attention.probe import failure

LEAST_TOKENS = 1024
BLOCK = 128

# One block mask per layout and window: every layer of a step asks for the same.
_block_masks: Any = WeakIdKeyDictionary()


class Flex:
    """Packed rows are one long row here."""

    name = "flex"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs a GPU, half precision, heads of 8, 16, ... 256 numbers and enough tokens."""
        reason = why_no_flash(call)
        if reason is None and call.rows * call.tokens < LEAST_TOKENS:
            reason = f"compiles, which fewer than {LEAST_TOKENS:,} tokens do not repay"
        return reason or failure(self, call.features)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        with torch.cuda.device_of(q):
            out, lse = _run(q, k, v, call)
        out = out.transpose(1, 2)
        if call.packed:
            return out.reshape(q.shape), (lse[0],)
        return out, (lse,)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        q, k, v = leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad(), torch.cuda.device_of(q):
            results = _run(q, k, v, call)
            gradients = [_one_row(call, dout).transpose(1, 2), torch.zeros_like(results[1])]
            if call.sinks:
                given = kept[0][None] if call.packed else kept[0]
                share = (results[1].detach() - given).exp_()
                dot = (dout.float() * out.float()).sum(-1, keepdim=True)
                gradients[1] = (1 - share) * _one_row(call, dot).transpose(1, 2)[..., 0]
                gradients[0] = gradients[0] * share[..., None].to(dout.dtype)
            dq, dk, dv = torch.autograd.grad(results, leaves, gradients)
        return dq, dk, dv


def _one_row(call: AttentionCall, x: Tensor) -> Tensor:
    return x.reshape(1, -1, *x.shape[2:]) if call.packed else x


def _run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out (B, H, S, D) and lse (B, H, S), packed rows as one row."""
    from torch.nn.attention.flex_attention import AuxRequest

    heads = (_one_row(call, t).transpose(1, 2) for t in (q, k, v))
    out, aux = _compiled()(
        *heads,
        score_mod=None if call.softcap is None else _bend(call.softcap, call.device),
        block_mask=_block_mask(call),
        scale=call.scale,
        enable_gqa=call.groups > 1,
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # as for masks
def _bend(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    # A tensor: a second value of a Python number would be traced as one, which inductor reads on the host and refuses.
    cap = torch.tensor(softcap, device=device)

    def bend(score: Tensor, *_where: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return bend


def _block_mask(call: AttentionCall) -> Any:
    """Who sees whom, kept for the layout; for dense rows for the last few lengths."""
    if call.layout is None:
        return _dense_block_mask(call.tokens, call.window, call.device)
    kept = _block_masks.setdefault(call.layout, {})
    if call.window not in kept:
        offsets = call.offsets[0]
        assert offsets is not None
        token = torch.arange(call.rows * call.tokens, device=call.device, dtype=torch.int32)
        kept[call.window] = build_block_mask(
            offsets[torch.bucketize(token, offsets[1:], right=True)], call.window
        )
    return kept[call.window]


@lru_cache(maxsize=8)
def _dense_block_mask(tokens: int, window: int | None, device: torch.device) -> Any:
    return build_block_mask(torch.zeros(tokens, dtype=torch.int32, device=device), window)


@torch.inference_mode(False)  # what is kept from an evaluation must serve a training step
def build_block_mask(begin: Tensor, window: int | None) -> Any:
    """flex_attention's BlockMask of causal documents, made from offsets: no (S, S) mask on the way.

    Args:
        begin: (S,) int32, the first token of each token's document.
        window: tokens a query may look back, itself included; None for all.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = len(begin)
    token = torch.arange(tokens, device=begin.device, dtype=torch.int32)
    first = begin if window is None else torch.maximum(begin, token - window + 1)
    # A query sees the keys from its ``first``, which never falls, to itself. A block of keys is touched
    # from the first query's ``first`` on, and seen whole from the last query's on.
    count = -(-tokens // BLOCK)
    block = torch.arange(count, device=begin.device)
    touched = first[block * BLOCK] // BLOCK
    whole = -(-first[((block + 1) * BLOCK - 1).clamp(max=tokens - 1)] // BLOCK)
    is_whole = (block >= whole[:, None]) & (block < block[:, None])
    in_part = (block >= touched[:, None]) & (block <= block[:, None]) & ~is_whole

    def visible(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[query])

    parts, wholes = _as_lists(in_part), _as_lists(is_whole)
    return BlockMask.from_kv_blocks(
        *parts, *wholes, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(tokens, tokens)
    )


def _as_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Per block of queries, how many blocks of keys are chosen and which, those first: int32 (1, 1, n[, n])."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
