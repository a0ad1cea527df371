"""A decoder layer during generation: the fused functions without gradients, and attention for one token.

One step is 17 kernels a layer here and 7 more with an adapter, where transformers' own layer has about 35 and PEFT's
adapter adds 40. Factors are cast once and not at every token; keys are not repeated for the heads that share them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pantheraml.kernels.low_rank import LowRank
from pantheraml.kernels.rms_norm import rms_norm
from pantheraml.kernels.rope import rotate_
from pantheraml.kernels.swiglu import glu_forward
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer
from pantheraml.models.fused.functions import AttentionInput, AttentionOutput, InputPart, OutputPart
from pantheraml.models.fused.projection import Projection
from pantheraml.models.patching import PatchSet

# Up to so many rows, kernels that hold whole rows and products that add the residual beat those made for training.
FEW_ROWS = 64


class Prepared:
    """What stays the same from token to token, made once: LoRA factors in the dtype of the computation, and the mask.

    A factor is cast again when it has changed.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[tuple[Tensor, ...], tuple[int, ...], Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def factors(self, factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """``factors`` below one another in ``dtype``."""
        key = (dtype, *(id(factor) for factor in factors))
        versions = tuple(factor._version for factor in factors)
        known = self._made.get(key)
        if (
            known is None
            or known[1] != versions
            or any(a is not b for a, b in zip(known[0], factors, strict=True))
        ):
            cast = [factor.detach().to(dtype) for factor in factors]
            known = factors, versions, cast[0].contiguous() if len(cast) == 1 else torch.cat(cast)
            self._made[key] = known
        return known[2]

    def mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A bool mask as what is added to the logits; every layer of a step asks with the same one."""
        if mask.dtype != torch.bool:
            return mask
        version = 0 if mask.is_inference() else mask._version
        known = self._made.get(("mask", dtype))
        if known is None or known[0][0] is not mask or known[1] != (version,):
            lowest = torch.full((), float("-inf"), dtype=dtype, device=mask.device)
            added = torch.zeros((), dtype=dtype, device=mask.device).where(mask, lowest)
            known = (mask,), (version,), added
            self._made["mask", dtype] = known
        return known[2]


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


def _parts(layer: FusedDecoderLayer, x: Tensor) -> tuple[InputPart, OutputPart] | None:
    """What the layer computes with; None where transformers' own layer has to compute."""
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
    return found


def _low_ranks(x: Tensor, projections: tuple[Projection, ...], prepared: Prepared) -> list[LowRank | None]:
    """LoRA's addend of each projection of x (T, K): one product with all their A together."""
    factors = tuple(p.a for p in projections if p.a is not None)
    if not factors:
        return [None] * len(projections)
    t = x @ prepared.factors(factors, x.dtype).T
    found: list[LowRank | None] = []
    start = 0
    for p in projections:
        if p.a is None or p.b is None:
            found.append(None)
            continue
        rank = p.a.shape[0]
        found.append(LowRank(t[:, start : start + rank], prepared.factors((p.b,), x.dtype), p.scale))
        start += rank
    return found


def _add_product(out: Tensor, x: Tensor, projection: Projection, prepared: Prepared) -> Tensor:
    """``out + projection(x)``, in place."""
    out.addmm_(x, projection.weight().T)
    (lora,) = _low_ranks(x, (projection,), prepared)
    return out if lora is None else out.addmm_(lora.t, lora.b.T, alpha=lora.scale)


def _enter(
    x: Tensor, part: InputPart, rotary: tuple[Tensor, Tensor], prepared: Prepared
) -> tuple[Tensor, Tensor, Tensor]:
    """``AttentionInput`` for few rows: x (B, S, H) -> q, k, v (B, heads, S, D)."""
    batch, tokens, width = x.shape
    h = rms_norm(x.reshape(-1, width), part.norm.weight, *part.norm.settings)
    found = []
    addends = _low_ranks(h, part.projections, prepared)
    for index, (projection, lora) in enumerate(zip(part.projections, addends, strict=True)):
        out = h @ projection.weight().T
        bias, turn = projection.linear.bias, rotary if index < 2 else None
        if turn is not None or bias is not None or lora is not None:
            rotate_(out, part.head_dim, turn, bias, lora)
        found.append(out.view(batch, tokens, -1, part.head_dim).transpose(1, 2))
    q, k, v = found
    return q, k, v


def _leave(x: Tensor, attended: Tensor, part: OutputPart, prepared: Prepared) -> Tensor:
    """``AttentionOutput`` for few rows: residuals are added inside the products that follow them."""
    shape = x.shape
    middle = _add_product(x.reshape(-1, shape[-1]).clone(), attended.flatten(0, 1), part.o, prepared)
    h = rms_norm(middle, part.norm.weight, *part.norm.settings)
    lora_gate, lora_up = _low_ranks(h, (part.gate, part.up), prepared)
    gate, up = h @ part.gate.weight().T, h @ part.up.weight().T
    value = glu_forward(gate, up, lora_gate, lora_up, part.activation)
    return _add_product(middle, value, part.down, prepared).view(shape)


def decode(
    prepared: Prepared,
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
        parts = _parts(layer, hidden_states)
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
        x = hidden_states.contiguous()
        few = batch * tokens <= FEW_ROWS
        if few:
            q, k, v = _enter(x, before, (cos, sin), prepared)
        else:
            q, k, v, x = AttentionInput.apply(x, before, cos, sin)
        k, v = past_key_values.update(k, v, module.layer_idx)
        if tokens == 1 and attention_mask is not None:
            attention_mask = prepared.mask(attention_mask, q.dtype)
        attended = _attend(layer, q, k, v, attention_mask, **kwargs).reshape(batch, tokens, -1)
        return _leave(x, attended, after, prepared) if few else AttentionOutput.apply(x, attended, after)


def apply_decoding_layers(model: nn.Module, patches: PatchSet) -> PatchSet:
    """Let the fused layers of ``model`` generate by the fused functions too.

    Args:
        model: the base model.
        patches: the ledger.

    Returns:
        ``patches``.
    """
    prepared = Prepared()
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            patches.bind(module, "forward", partial(decode, prepared), "fused functions in generation")
    return patches
