"""Telling base models apart, whatever precision they are loaded in.

A fingerprint holds the architecture, its sizes, and some real weight values: the first rows of the
input embedding and a few norms, which no 4-bit or 8-bit load quantises. A hash would differ between
float16 and bfloat16 loads of one checkpoint, so the values themselves are kept and compared to within
bfloat16's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pantheraml.export.weights import Weight, plain_model, plain_weights, without_adapters

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
)
_ROWS, _COLUMNS = 8, 32


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The base model under ``model`` as a small dictionary for JSON.

    Args:
        model: a transformers model, or a PEFT model around one (whose trained parts are not looked at).

    Returns:
        "name", "architecture", "sizes", and "values": lists of numbers by weight name; weights that are
        not in memory are left out.
    """
    plain = plain_model(model)
    config = plain.config.get_text_config()
    sizes = {key: getattr(config, key, None) for key in _SIZES}
    return {
        "name": base_name(plain),
        "architecture": type(plain).__name__,
        "sizes": {key: size for key, size in sizes.items() if isinstance(size, int)},
        "values": {weight.name: _sample(weight.tensor) for weight in _landmarks(model)},
    }


def base_name(model: nn.Module) -> str:
    """Folder or hub name the base model was loaded from, or its class if unknown."""
    plain = plain_model(model)
    return getattr(plain.config, "_name_or_path", "") or type(plain).__name__


def differences(recorded: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """What tells two fingerprints apart, as phrases; empty when they are of the same base model."""
    if recorded["architecture"] != present["architecture"]:
        return [f"{present['architecture']} instead of {recorded['architecture']}"]
    keys = recorded["sizes"].keys() | present["sizes"].keys()
    sizes = [(key, present["sizes"].get(key), recorded["sizes"].get(key)) for key in sorted(keys)]
    wrong = [f"{key} {here} instead of {there}" for key, here, there in sizes if here != there]
    if wrong:
        return wrong
    shared = recorded["values"].keys() & present["values"].keys()
    return [
        f"other values in {name}"
        for name in sorted(shared)
        if not _alike(recorded["values"][name], present["values"][name])
    ]


def _landmarks(model: nn.Module) -> list[Weight]:
    """The input embedding and the first, the middle and the last norm of the base model."""
    embedding = without_adapters(plain_model(model).get_input_embeddings())
    weights = [weight for weight in plain_weights(model, trained=False) if not weight.tensor.is_meta]
    norms = [weight for weight in weights if weight.tensor.ndim == 1 and weight.name.endswith("norm.weight")]
    chosen = [norms[place] for place in sorted({0, len(norms) // 2, len(norms) - 1})] if norms else []
    return [weight for weight in weights if weight.module is embedding][:1] + chosen


def _sample(tensor: torch.Tensor) -> list[float]:
    """Some of the first values, in float32."""
    corner = tensor.detach()[:_ROWS, :_COLUMNS] if tensor.ndim > 1 else tensor.detach()[: _ROWS * _COLUMNS]
    return [float(f"{value:.5g}") for value in corner.float().flatten().tolist()]


def _alike(one: list[float], other: list[float]) -> bool:
    """Equal to within the rounding of two loads in different 16-bit formats."""
    first, second = torch.tensor(one), torch.tensor(other)
    return first.shape == second.shape and torch.allclose(first, second, rtol=2**-7, atol=1e-6)
