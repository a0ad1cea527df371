"""What a linear layer computes, read from the layer itself: base weight, bias, LoRA factors.

The layers stay where they are and keep their Parameters; fused functions read them at every call, so that disabling
an adapter, loading another one or merging acts at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from pantheraml.models.fp8 import Fp8Linear
from pantheraml.models.sample_dropout import SampleDropout

_KINDS = ("Linear", "Linear4bit", "Fp8Linear")


class Projection(NamedTuple):
    """``y = x W^T + bias + scale * (dropped(x) A^T B^T + lora_bias)``.

    Attributes:
        linear: the base layer (nn.Linear, bitsandbytes' 4-bit one, or Fp8Linear).
        a: LoRA's A, (R, K), or None without an active adapter.
        b: LoRA's B, (N, R), or None.
        scale: the adapter's scale.
        lora_bias: LoRA's own bias, (N,), or None.
        dropout: the share of the adapter's input that is dropped at this call.
        number: of the adapter in the model, for masks that follow from samples; None where they do not.
        weight: that of the base layer where it is trained, else None.
        bias: likewise.
    """

    linear: nn.Linear
    a: Tensor | None
    b: Tensor | None
    scale: float
    lora_bias: Tensor | None = None
    dropout: float = 0.0
    number: int | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the base layer is trained."""
        return self.weight is not None or self.bias is not None

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """What is trained: A, B and bias of the adapter, or without one weight and bias of the base layer."""
        return (self.weight, self.bias) if self.a is None else (self.a, self.b, self.lora_bias)

    @property
    def is_packed(self) -> bool:
        """Whether the base weight is held in 4 bits."""
        return getattr(self.linear.weight, "quant_state", None) is not None

    @property
    def is_fp8(self) -> bool:
        """Whether the base weight is held in FP8."""
        return isinstance(self.linear, Fp8Linear)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        if isinstance(self.linear, Fp8Linear):
            return self.linear.compute_dtype
        state = getattr(self.linear.weight, "quant_state", None)
        return self.linear.weight.dtype if state is None else state.dtype

    @property
    def features(self) -> int:
        """N."""
        return self.linear.out_features

    @property
    def rank(self) -> int:
        """R, 0 without an adapter."""
        return 0 if self.a is None else self.a.shape[0]

    @property
    def packed(self) -> tuple[Tensor, Any]:
        """The bytes of a weight held in 4 bits, and their ``bitsandbytes.functional.QuantState``."""
        weight: Any = self.linear.weight
        return weight.data, weight.quant_state


def is_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two readings are of the same tensors and modules, with the same numbers."""
    return all(a is b or (isinstance(a, float) and a == b) for a, b in zip(one, other, strict=True))


def read_projection(layer: nn.Module, *, as_frozen: bool = False) -> Projection | str:
    """The projection of ``layer``, or why it cannot be computed by a fused function.

    Covered are linears that are trained, and frozen ones without adapter or with one plain LoRA adapter
    (rank-stabilised or not, any start, with dropout or a bias of its own); ``as_frozen`` takes those that are trained
    for frozen, for who wants no gradients.
    """
    # Through the dictionaries: modules' own search for a name costs more than all else here, in every layer of a step.
    module: Any = layer
    adapted = isinstance(layer, LoraLayer)
    base: Any = module.get_base_layer() if adapted else layer
    if not isinstance(base, nn.Linear):
        return f"{type(base).__name__} is no linear layer"
    weight: Any = base._parameters.get("weight")
    bias = base._parameters.get("bias")
    kind = type(base).__name__
    if kind not in _KINDS or weight is None or "forward" in vars(base):
        return f"{kind} computes in a way of its own"
    if kind == "Linear4bit" and getattr(weight.quant_state, "packing_format_for_cpu", False):
        return "4-bit weights are packed for inference"
    own = weight if weight.requires_grad and not as_frozen else None
    own_bias = bias if bias is not None and bias.requires_grad and not as_frozen else None
    if own_bias is not None and kind != "Linear":
        return "biases of quantised weights are trained"
    if not adapted or module.disable_adapters or module.merged:
        return Projection(base, None, None, 0.0, weight=own, bias=own_bias)
    factors = module._modules
    first, second = factors["lora_A"]._modules, factors["lora_B"]._modules
    names = [name for name in module.active_adapters if name in first]
    if not names:
        return Projection(base, None, None, 0.0, weight=own, bias=own_bias)
    if own is not None or own_bias is not None:
        return "base weights are trained beside an adapter"
    if len(names) > 1:
        return "several adapters are active"
    (name,) = names
    if name in module.lora_variant:
        return f"the adapter is a {type(module.lora_variant[name]).__name__}"
    if module.fan_in_fan_out:
        return "the weight is stored turned"
    dropout = factors["lora_dropout"]._modules[name]
    if dropout.training and type(dropout) not in (nn.Dropout, nn.Identity, SampleDropout):
        return f"the adapter's input goes through {type(dropout).__name__}"
    p = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
    a, b, number = first[name]._parameters, second[name]._parameters, getattr(dropout, "number", None)
    return Projection(base, a["weight"], b["weight"], float(module.scaling[name]), b["bias"], p, number)


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``dtype`` tensors are computed in that dtype, which autocast may change."""
    return not torch.is_autocast_enabled(device.type) or torch.get_autocast_dtype(device.type) == dtype
