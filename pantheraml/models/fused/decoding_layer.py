"""A decoder layer during generation: the fused functions without gradients, and attention for one token.

One step of decoding is some 14 kernels a layer here, where transformers' own layer with PEFT's adapter has about 70.
Adapter factors are cast once and not at every token; keys and values are not repeated for the heads of a group.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pantheraml.models.fused.decoder_layer import FusedDecoderLayer
from pantheraml.models.fused.functions import AttentionInput, AttentionOutput, InputPart, OutputPart
from pantheraml.models.fused.projection import Projection
from pantheraml.models.patching import PatchSet


class FactorCasts:
    """LoRA factors in the dtype of the computation, cast again only when they have changed."""

    def __init__(self) -> None:
        self._casts: dict[int, tuple[Tensor, int, Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def cast(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """``factor`` in ``dtype``; (R, K) or (N, R)."""
        known = self._casts.get(id(factor))
        if (
            known is not None
            and known[0] is factor
            and known[1] == factor._version
            and known[2].dtype == dtype
        ):
            return known[2]
        cast = factor.detach().to(dtype)
        self._casts[id(factor)] = (factor, factor._version, cast)
        return cast

    def of(self, projection: Projection, dtype: torch.dtype) -> Projection:
        """``projection`` with its factors cast."""
        if projection.a is None or projection.b is None:
            return projection
        return projection._replace(a=self.cast(projection.a, dtype), b=self.cast(projection.b, dtype))


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of one query per row; the heads that share keys stand where several queries would.

    Args:
        query: (B, H, 1, D).
        key: (B, K, T, D).
        value: (B, K, T, D).
        mask: (B, 1, 1, T) bool or added, or None.
        scale: of the logits.

    Returns:
        (B, 1, H, D).
    """
    batch, heads, _, dim = query.shape
    packed = query.reshape(batch, key.shape[1], -1, dim)
    out = functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, dim)


def _attend(
    layer: FusedDecoderLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **rest: Any,
) -> Tensor:
    """Attention of ``layer``, (B, S, H, D)."""
    module: Any = layer.self_attn
    name = layer.config._attn_implementation
    is_plain = name in ("pantheraml", "sdpa") and (mask is None or mask.shape[1] == 1)
    if query.shape[2] == 1 and is_plain:
        return attend_one(query, key, value, mask, module.scaling)
    window = getattr(module, "sliding_window", None) or getattr(layer.config, "sliding_window", None)
    attended, _ = ALL_ATTENTION_FUNCTIONS[name](
        module, query, key, value, mask, dropout=0.0, scaling=module.scaling, sliding_window=window, **rest
    )
    return attended


def _parts(layer: FusedDecoderLayer, x: Tensor, casts: FactorCasts) -> tuple[InputPart, OutputPart] | None:
    """What the layer computes with, factors cast; None where transformers' own layer has to compute."""
    found = layer._read_parts(x)
    if found is None:
        return None
    before, after = found
    projections = (*before.projections, after.o, after.gate, after.up, after.down)
    # Packed weights are multiplied faster packed than after unpacking, one token at a time.
    if any(getattr(p.linear.weight, "quant_state", None) is not None for p in projections):
        return None
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    modules: list[nn.Module] = [attention, mlp, *attention.children(), *mlp.children()]
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None  # PEFT chooses adapters per row by hooks
    q, k, v, o, gate, up, down = (casts.of(p, x.dtype) for p in projections)
    return (
        InputPart(before.norm, (q, k, v), before.head_dim),
        OutputPart(o, after.norm, gate, up, down, after.activation),
    )


def decode(
    casts: FactorCasts,
    layer: FusedDecoderLayer,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """The layer's forward in generation, (B, S, H) -> (B, S, H); everything else as before."""
    parts = None
    if past_key_values is not None and position_embeddings is not None and not torch.is_grad_enabled():
        parts = _parts(layer, hidden_states, casts)
    if parts is None or position_embeddings is None or past_key_values is None:
        return type(layer).forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    before, after = parts
    batch, tokens, _ = hidden_states.shape
    cos, sin = (part.expand(batch, -1, -1).reshape(batch * tokens, -1) for part in position_embeddings)
    module: Any = layer.self_attn
    kwargs.pop("use_cache", None)
    with torch.autocast(hidden_states.device.type, enabled=False):
        q, k, v, residual = AttentionInput.apply(hidden_states.contiguous(), before, cos, sin)
        k, v = past_key_values.update(k, v, module.layer_idx)
        attended = _attend(layer, q, k, v, attention_mask, **kwargs)
        return AttentionOutput.apply(residual, attended.reshape(batch, tokens, -1), after)


def apply_decoding_layers(model: nn.Module, patches: PatchSet) -> PatchSet:
    """Let the fused layers of ``model`` generate by the fused functions too.

    Args:
        model: the base model.
        patches: the ledger.

    Returns:
        ``patches``.
    """
    casts = FactorCasts()
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            patches.bind(module, "forward", partial(decode, casts), "fused functions in generation")
    return patches
