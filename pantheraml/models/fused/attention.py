"""The attention implementation "pantheraml": the fastest backend that works, and documents kept apart.

transformers calls two functions that register here under the name. The mask function answers "no mask"
whenever nothing but causality, the layer's window and the documents limit who sees whom; the attention
function then reads the documents from the position ids that every layer is given and asks the table of
``kernels/attention`` for a backend. So a packed row needs no (S, S) mask on a GPU, nor do soft-caps and
sinks, and packing also holds for models whose code does not pass position ids to the mask (gpt_oss).
Everything else (masks, dropout, caches, CPU) is handed to transformers' own functions as it came.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pantheraml.kernels.attention import AttentionCall, attend, choose, read_layout
from pantheraml.models.families import ModelFamily
from pantheraml.models.patching import PatchSet

NAME = "pantheraml"


def mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **rest: Any,
) -> Tensor | None:
    """The mask of a batch, or None when the attention function can tell it from positions and window.

    Args:
        q_length: number of queries.
        kv_length: number of keys.
        attention_mask: (B, kv_length) bool, True for real tokens.
        use_vmap: whether a model added a pattern of its own.
        rest: what else transformers passes to ``sdpa_mask``.

    Returns:
        (B, 1, q_length, kv_length) bool, or None.
    """
    offsets = (rest.get("q_offset", 0), rest.get("kv_offset", 0))
    whole = q_length == kv_length and all(isinstance(offset, int) and offset == 0 for offset in offsets)
    own_pattern = use_vmap or "allow_is_bidirectional_skip" in rest
    if whole and not own_pattern and (attention_mask is None or _all_real(attention_mask, kv_length)):
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, use_vmap=use_vmap, **rest
    )


def _all_real(attention_mask: Tensor, length: int) -> bool:
    return attention_mask.shape[-1] == length and bool(attention_mask.all())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer.

    Args:
        module: the layer's attention.
        query: (B, H, S, D).
        key: (B, K, T, D).
        value: (B, K, T, D).
        attention_mask: what ``mask`` returned, or a mask the user made.
        sliding_window: tokens a query may look back, itself included.
        softcap: of the logits (Gemma 2).
        s_aux: a learned logit per head (gpt_oss).
        rest: ``scaling``, ``dropout``, ``is_causal``, ``position_ids`` and what else the layer was given.

    Returns:
        (B, S, H, D), and the weights where transformers' eager function computed them.
    """
    causal = rest.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    length = query.shape[2]
    needs_eager = softcap is not None or s_aux is not None
    if attention_mask is None and causal and length > 1:
        key, value = key[:, :, :length], value[:, :, :length]  # a static cache is longer than what it holds
        layout = read_layout(
            (query.shape[0], length),
            query.device,
            rest.get("position_ids"),
            rest.get("cu_seq_lens_q"),
            rest.get("max_length_q"),
        )
        if not rest.get("dropout") and value.shape[-1] == query.shape[-1]:
            q, k, v = _by_token(query, key, value)
            call = AttentionCall.of(
                q, k, layout, rest.get("scaling"), sliding_window, softcap, s_aux is not None
            )
            if choose(call).name != "plain":  # transformers' own functions do what that one does
                return attend(q, k, v, call, s_aux), None
        windowed = sliding_window is not None and length >= sliding_window
        if needs_eager or windowed or layout.cu_seqlens is not None:
            attention_mask = layout.mask(sliding_window if windowed else None)
    if needs_eager:
        return _eager(module, query, key, value, attention_mask, softcap=softcap, **rest)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)


def _by_token(*heads: Tensor) -> tuple[Tensor, ...]:
    """(B, heads, S, D) as (B, S, heads, D), in the dtype of autocast where it is on."""
    device = heads[0].device.type
    if torch.is_autocast_enabled(device):
        heads = tuple(t.to(torch.get_autocast_dtype(device)) for t in heads)
    return tuple(t.transpose(1, 2) for t in heads)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' eager function of this model: the one that knows its soft-cap and its sinks."""
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros((), dtype=query.dtype, device=query.device).where(attention_mask, lowest)
    own = import_module(type(module).__module__).eager_attention_forward
    return own(module, query, key, value, attention_mask, **rest)


def apply_attention(model: nn.Module, family: ModelFamily, patches: PatchSet) -> PatchSet:
    """Let ``model`` attend through this file, unless its attention was chosen otherwise.

    Args:
        model: the model or its PEFT wrapper.
        family: its family.
        patches: the ledger.

    Returns:
        ``patches``.
    """
    config: Any = model.config
    current = config._attn_implementation
    # Where SDPA lacks what a family needs, transformers itself starts with eager.
    replaceable = {"sdpa"} | (
        {"eager"} if family.deviations & {"attention_softcap", "attention_sinks"} else set()
    )
    if family.not_text:
        patches.skip(
            "attention", "image tokens see each other in both directions, which transformers' code handles"
        )
    elif current not in replaceable:
        patches.skip("attention", f"attn_implementation={current!r} is in use")
    else:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        patches.set(
            config, "_attn_implementation", NAME, "documents of packed rows are kept apart without a mask"
        )
    return patches
