"""Adapted tiny models for the tests of export."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
IDS = torch.arange(5, 53).reshape(2, 24)


def adapted(model, **options) -> PeftModel:
    """``model`` with random LoRA on every linear layer and expert parameter, in eval mode."""
    if "target_modules" not in options:
        experts = [name for name, weight in model.named_parameters() if weight.ndim == 3]
        options["target_modules"] = FUSED if model.config.model_type == "phi3" else LINEAR
        if experts:
            options["target_modules"] = LINEAR[:4]
            options["target_parameters"] = [name for name in experts if not name.endswith("bias")]
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{"r": 4, "init_lora_weights": False, **options})).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Float32 logits of ``model`` on fixed tokens."""
    return model(IDS.to(model.device)).logits.float()


def snapshot(model) -> dict[str, torch.Tensor]:
    """Copies of every parameter and buffer, and of 4-bit scales."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    scales = {
        f"{name} scales": weight.quant_state.absmax
        for name, weight in state.items()
        if getattr(weight, "quant_state", None) is not None
    }
    return {name: tensor.detach().clone() for name, tensor in (state | scales).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bitwise equality of two dictionaries of tensors."""
    assert one.keys() == other.keys()
    different = [
        name for name in one if one[name].dtype != other[name].dtype or not one[name].equal(other[name])
    ]
    assert different == []
