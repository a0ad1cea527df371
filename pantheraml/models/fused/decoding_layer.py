"""A decoder layer during generation: the fused halves without gradients, and attention for one token.

One token is 13 kernels a layer here and 8 more with an adapter, where transformers' own layer has about 35 and PEFT's
adapter adds 40. LoRA's factors are put beside the weights when a prompt is read, and stay there for its answer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pantheraml.kernels.launch import launching_on
from pantheraml.kernels.rms_norm import rms_norm_into
from pantheraml.kernels.rope import Rotary
from pantheraml.kernels.swiglu import glu_forward
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer, _shared
from pantheraml.models.fused.halves import project_in
from pantheraml.models.fused.parts import MiddlePart, MLPPart
from pantheraml.models.fused.read_layer import LayerParts
from pantheraml.models.patching import PatchSet, is_foreign

# Up to so many rows, a norm of whole rows after a plain sum beats the kernel made for training.
FEW_ROWS = 64


class Prepared:
    """What stays the same from token to token, made once: the parts of each layer, and the mask."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[FusedDecoderLayer, LayerParts | None]] = {}
        self._mask: tuple[Tensor, int, torch.dtype, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A bool mask as what is added to the logits; every layer of a step asks with the same one."""
        if mask.dtype != torch.bool:
            return mask
        version = 0 if mask.is_inference() else mask._version
        known = self._mask
        if known is None or known[0] is not mask or known[1:3] != (version, dtype):
            lowest = torch.full((), float("-inf"), dtype=dtype, device=mask.device)
            added = torch.zeros((), dtype=dtype, device=mask.device).where(mask, lowest)
            known = self._mask = mask, version, dtype, added
        return known[3]


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
    prepared: Prepared,
    **rest: Any,
) -> Tensor:
    """Attention of ``layer``, (B, S, H, D)."""
    module: Any = layer.self_attn
    settings = layer._attention_settings(module)
    known = module.config._attn_implementation in ("pantheraml", "sdpa")
    special = settings.get("softcap") is not None or settings.get("s_aux") is not None
    if query.shape[2] > 1 or not known or special or mask is None or mask.shape[1] > 1:
        return layer._attend(query, key, value, mask, **rest)
    return attend_one(query, key, value, prepared.mask(mask, query.dtype), settings["scaling"])


def _read(layer: FusedDecoderLayer, x: Tensor) -> LayerParts | None:
    """What the layer computes with, LoRA's factors put in place; None where transformers' own layer computes."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    modules: list[nn.Module] = [attention, mlp, *attention.children(), *mlp.children()]
    hooks = (
        hook for one in modules for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())
    )
    if any(map(is_foreign, hooks)):
        return None  # PEFT chooses adapters per row by hooks
    # Packed weights are multiplied faster packed than after unpacking, one token at a time.
    if any(getattr(weight, "quant_state", None) is not None for weight in layer.parameters()):
        return None
    # Weights may be moved now, and must not become tensors that training cannot use.
    with torch.inference_mode(False), torch.no_grad():
        parts = layer._parts(x, as_frozen=True)
    # The parts of a prompt serve the tokens after it, whose masks would all be that of its first row.
    return None if parts is None or parts.drop else parts


def _parts(
    layer: FusedDecoderLayer, x: Tensor, past_key_values: Any, prepared: Prepared
) -> LayerParts | None:
    """The parts as they were read with the prompt, for the tokens after it; read anew for everything else."""
    module: Any = layer.self_attn
    cached = past_key_values.layers[module.layer_idx]
    known = prepared.parts.get(id(layer))
    if getattr(cached, "is_kept", False) and cached.is_initialized and x.shape[1] == 1:
        if known is not None and known[0] is layer:
            return known[1]
        return _read(layer, x)
    parts = _read(layer, x)
    prepared.parts[id(layer)] = layer, parts
    return parts


def _leave(x: Tensor, attended: Tensor, middle: MiddlePart, part: MLPPart) -> Tensor:
    """The layer after its attention, for few rows: x (T, H), attended (T, heads * D) -> (T, H)."""
    o = middle.o.product(attended, middle.o.projections[0].linear.bias).y
    if middle.post is not None:
        o = rms_norm_into(torch.empty_like(o), o, middle.post)
    s = x + o
    h = part.gate_up.widened(s, s.shape[1])
    rms_norm_into(h[:, : s.shape[1]], s, middle.norm)
    gate, up = part.gate_up.product(h).y.chunk(2, dim=1)
    value = part.down.widened(s, part.down.cols)
    glu_forward(gate, up, part.activation, value[:, : part.down.cols])
    down = part.down.product(value).y
    if part.post is not None:
        down = rms_norm_into(torch.empty_like(down), down, part.post)
    return s.add_(down)


def _few_rows(
    layer: FusedDecoderLayer,
    x: Tensor,
    parts: LayerParts,
    rotary: Rotary,
    mask: Tensor | None,
    past_key_values: Any,
    prepared: Prepared,
    **kwargs: Any,
) -> Tensor:
    module: Any = layer.self_attn
    flat = x.reshape(-1, x.shape[-1])
    heads = project_in(flat, parts.input, rotary).qkv.split(parts.input.widths, dim=1)
    shape = (*x.shape[:2], -1, parts.input.head_dim)
    q, k, v = (part.view(shape).transpose(1, 2) for part in heads)
    k, v = past_key_values.update(k, v, module.layer_idx)
    attended = _attend(layer, q, k, v, mask, prepared, **kwargs).reshape(flat.shape[0], -1)
    assert parts.mlp is not None
    return _leave(flat, attended, parts.middle, parts.mlp).view(x.shape)


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
        parts = _parts(layer, hidden_states, past_key_values, prepared)
    if parts is None or position_embeddings is None:
        return type(layer).forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    rotary = _shared(position_embeddings, hidden_states, parts.input).rotary
    few = parts.mlp is not None and hidden_states.shape[:2].numel() <= FEW_ROWS
    if not few:
        with launching_on(hidden_states):
            return layer._around_attention(
                hidden_states,
                parts=parts,
                factors=parts.factors,
                rotary=rotary,
                mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
    device = hidden_states.device.type
    with launching_on(hidden_states), torch.autocast(device, enabled=False):
        return _few_rows(
            layer, hidden_states, parts, rotary, attention_mask, past_key_values, prepared, **kwargs
        )


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
