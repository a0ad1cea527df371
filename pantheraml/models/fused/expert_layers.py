"""What the experts of a layer compute, read from the module itself: weights, biases, LoRA factors, activation.

PEFT wraps the module once for each adapted parameter and, in its own forward, adds the adapter to the whole weight
before the experts run. The fused function needs the parts apart; they are read at every call, so that disabling an
adapter, loading another one or merging acts at once.

PEFT's factors hold all experts: A (E * R, K), expert after expert; B (N, R * E), the experts of each rank in turn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from pantheraml.kernels.expert_activation import Gate
from pantheraml.kernels.grouped_gemm import MAX_RANK

# Experts of transformers whose forward is: gate and up in one product, activation, product.
_CLASSES = ("MixtralExperts", "Qwen3MoeExperts", "GptOssExperts")
_PARAMETERS = ("gate_up_proj", "down_proj")


class ExpertProjection(NamedTuple):
    """``y = x W[e]^T + bias[e] + scale * (x A[e]^T) B[e]^T``.

    Attributes:
        parameter: the weight as the module stores it.
        stored_in_by_out: whether that is (E, K, N) instead of (E, N, K).
        bias: (E, N) or None.
        a: LoRA's A as PEFT stores it, (E * R, K), or None without an active adapter.
        b: LoRA's B as PEFT stores it, (N, R * E), or None.
        scale: the adapter's scale.
    """

    parameter: Tensor
    stored_in_by_out: bool
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float

    @property
    def weight(self) -> Tensor:
        """W (E, N, K), a view."""
        return self.parameter.mT if self.stored_in_by_out else self.parameter

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A (E, R, K) and B (E, N, R) in ``dtype``."""
        if self.a is None or self.b is None:
            return None
        experts = self.parameter.shape[0]
        a = self.a.detach().to(dtype).view(experts, -1, self.a.shape[1])
        b = self.b.detach().view(self.b.shape[0], -1, experts).permute(2, 0, 1)
        return a, torch.empty(b.shape, dtype=dtype, device=b.device).copy_(b)

    def trained(self) -> tuple[Tensor | None, ...]:
        """A, B, weight and bias: the inputs that a gradient may be asked for."""
        return self.a, self.b, self.parameter, self.bias


class Experts(NamedTuple):
    """The experts of a layer."""

    gate_up: ExpertProjection
    down: ExpertProjection
    gate: Gate

    @property
    def count(self) -> int:
        """E."""
        return self.down.parameter.shape[0]


def read_experts(module: nn.Module) -> Experts | str:
    """The experts of ``module``, or why a fused function cannot compute them.

    Covered are the fused weights of mixtral, qwen3_moe and gpt_oss, trained or frozen, with no adapter or one plain
    LoRA adapter on either of them.
    """
    base: Any = module
    wrappers: dict[str, ParamWrapper] = {}
    while isinstance(base, ParamWrapper):
        if base.parameter_name in wrappers or base.parameter_name not in _PARAMETERS or _has_hooks(base):
            return f"{base.parameter_name} is adapted in a way of its own"
        wrappers[base.parameter_name] = base
        base = base.base_layer
    reason = _why_not(base)
    if reason is not None:
        return reason
    projections: list[ExpertProjection] = []
    for name in _PARAMETERS:
        adapter = _read_adapter(wrappers[name]) if name in wrappers else (None, None, 0.0)
        if isinstance(adapter, str):
            return adapter
        bias = getattr(base, f"{name}_bias") if base.has_bias else None
        projections.append(ExpertProjection(getattr(base, name), base.is_transposed, bias, *adapter))
    gate = Gate(in_turn=not base.is_concatenated)
    if type(base).__name__ == "GptOssExperts":
        gate = Gate(gate.in_turn, True, float(base.alpha), float(base.limit))
    gate_up, down = projections
    return Experts(gate_up, down, gate)


def _why_not(base: Any) -> str | None:
    """Why the plain experts module is not one we know."""
    kind = type(base).__name__
    if kind not in _CLASSES or not type(base).__module__.startswith("transformers.models."):
        return f"{kind} computes in a way of its own"
    if _has_hooks(base) or "forward" in vars(base):
        return "another library has hooks on the experts"
    if getattr(base, "_is_expert_parallel", False):
        return "the experts are spread over several GPUs"
    if hasattr(base, "act_fn") and type(base.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"the activation is {type(base.act_fn).__name__}"
    parameters = list(base.parameters(recurse=False))
    if any(type(parameter) is not nn.Parameter for parameter in parameters):
        return "the weights are no plain tensors"
    if len({parameter.dtype for parameter in parameters}) > 1 or not parameters[0].dtype.is_floating_point:
        return "the weights are quantised or of several dtypes"
    return None


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(vars(module).get(kind) for kind in kinds)


def _read_adapter(wrapper: Any) -> tuple[Tensor | None, Tensor | None, float] | str:
    """A, B and scale of the active adapter, or why it is not plain."""
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.disable_adapters and wrapper.merged:
        return "a merged adapter is about to be taken out again"
    if wrapper.disable_adapters or wrapper.merged or not names:
        return None, None, 0.0
    if len(names) > 1:
        return "several adapters are active"
    name = names[0]
    if name in wrapper.lora_variant or wrapper.lora_bias.get(name):
        return "the adapter is not plain LoRA"
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    if a.shape[0] // wrapper.num_experts > MAX_RANK:
        return f"the adapter's rank is above {MAX_RANK}"
    return a, b, float(wrapper.scaling[name])
