"""What an adapter adds to a weight, in float32.

``W + s * B @ A`` with ``s`` the adapter's scale (rank-stabilised or not); DoRA rescales the sum to the
trained magnitude of each output. PEFT's own ``get_delta_weight`` rounds the product to the adapter's or
the weight's dtype before it is added, so the product is formed here, added in place and never rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer

from pantheraml.errors import AdapterError

# A PEFT layer (BaseTunerLayer); it gets most of its attributes at run time, out of a type checker's sight.
AdapterLayer = Any
_DORA = (DoraLinearVariant, DoraEmbeddingVariant)


def check_mergeable(layer: AdapterLayer, name: str) -> None:
    """Refuse the kinds of adapters that ``add_adapter`` cannot express.

    Args:
        layer: an adapter layer.
        name: where it is, for the message.

    Raises:
        AdapterError: it is not LoRA, rsLoRA, DoRA or trained tokens, or it has no weight to go into.
    """
    if isinstance(layer, TrainableTokensLayer):
        return
    kind = type(layer).__name__
    if isinstance(layer, LoraLayer) and not isinstance(layer, MultiheadAttention):
        names = _names(layer)
        variants = [layer.lora_variant[one] for one in names if one in layer.lora_variant]
        strange = [type(one).__name__ for one in variants if not isinstance(one, _DORA)]
        if not strange and (not variants or len(names) == 1):
            if any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None:
                raise AdapterError(
                    got=f"{name} was trained with lora_bias=True, but the layer has no bias.",
                    need="Merging needs a place for every trained value, and the plain layer has none.",
                    fix="Use save_method='lora', or train with lora_bias=False.",
                )
            return
        kind = strange[0] if strange else f"mix of DoRA and other adapters ({', '.join(names)})"
    raise AdapterError(
        got=f"{name} has an adapter that cannot be merged: {kind}.",
        need="LoRA, rsLoRA, DoRA (one at a time), trained tokens and modules_to_save can be.",
        fix="Use save_method='lora', which saves the adapter itself.",
    )


def add_adapter(layer: AdapterLayer, attribute: str, value: torch.Tensor) -> None:
    """Add what the active adapters of ``layer`` learned to ``value``, in place.

    Args:
        layer: the adapter layer.
        attribute: the tensor of its base layer: "weight", "bias", or an expert parameter's name.
        value: that tensor's values, float32, in the shape of the base layer.
    """
    if isinstance(layer, TrainableTokensLayer):
        source = layer.tied_adapter or layer
        for name in layer.active_adapters:
            rows = torch.tensor(source.token_indices[name], device=value.device)
            value.index_copy_(0, rows, source.trainable_tokens_delta[name].to(value))
        return
    for name in _names(layer):
        if attribute == "bias":
            if layer.lora_bias[name]:
                value.add_(layer.lora_B[name].bias.to(value), alpha=layer.scaling[name])
            continue
        if not _is_embedding(layer) and layer.lora_A[name].weight.ndim > 2:  # convolutions
            value.add_(layer.get_delta_weight(name).to(value))
        else:
            left, right = (factor.to(value) for factor in _factors(layer, name))
            add_product = value.addmm_ if value.ndim == 2 else value.baddbmm_
            add_product(left, right, alpha=layer.scaling[name])
        if name in layer.lora_variant:
            _rescale(layer, name, value)


def _is_embedding(layer: AdapterLayer) -> bool:
    return isinstance(layer, Embedding)


def _names(layer: AdapterLayer) -> list[str]:
    """The active adapters that ``layer`` has."""
    factors = layer.lora_embedding_A if _is_embedding(layer) else layer.lora_A
    return [name for name in layer.active_adapters if name in factors]


def _factors(layer: AdapterLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors whose product has the shape of the adapted tensor."""
    if _is_embedding(layer):
        return layer.lora_embedding_A[name].T, layer.lora_embedding_B[name].T
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if isinstance(layer, ParamWrapper) and layer.get_param().ndim == 3:
        a = a.reshape(layer.num_experts, -1, a.shape[-1])  # (experts, rank, in)
        b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)  # (experts, out, rank)
        stored_out_by_in = layer._did_swap_in_out_features
        return (b, a) if stored_out_by_in else (a.mT, b.mT)
    return (a.T, b.T) if layer.fan_in_fan_out else (b, a)


def _rescale(layer: AdapterLayer, name: str, value: torch.Tensor) -> None:
    """DoRA: give each output of ``value`` the trained magnitude."""
    input_dim = 0 if _is_embedding(layer) or layer.fan_in_fan_out else 1
    norm = torch.linalg.vector_norm(value, dim=input_dim, keepdim=True)
    value.mul_(layer.lora_magnitude_vector[name].weight.to(value).view_as(norm) / norm)
