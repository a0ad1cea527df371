"""The weights of a model as tensors of a GGUF file: what they are called there, and how their values are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pantheraml.errors import NotYetError
from pantheraml.export.gguf.families import GgufFamily
from pantheraml.export.gguf.formats import load_gguf
from pantheraml.export.weights import Weight

Layout = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: in the file, as torch has it.
        of: gives the tensor of the merged weight's values.
    """

    name: str
    shape: tuple[int, ...]
    of: Layout


def plan_tensors(
    weights: Iterable[Weight], config: Any, family: GgufFamily
) -> list[tuple[Weight, list[Piece]]]:
    """What each weight becomes.

    Args:
        weights: those of the plain model, without tied copies.
        config: transformers' configuration.
        family: of it.

    Raises:
        NotYetError: a weight has no place in the file.
    """
    gguf = load_gguf()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    plan = []
    for weight in weights:
        pieces = []
        for source, layout in _layouts(weight, config, family):
            stem, ending = _stem(source)
            name = names.get_name(stem)
            if name is None:
                raise NotYetError(
                    got=f"The model has the weight {weight.name}.",
                    need=f"llama.cpp's {family.architecture} models have no place for it.",
                    fix="Use save_pretrained_merged, which transformers and vLLM load.",
                )
            shape = tuple(layout(torch.empty(weight.shape, device="meta")).shape)
            pieces.append(Piece(name + ending, shape, layout))
        plan.append((weight, pieces))
    return plan


def _stem(name: str) -> tuple[str, str]:
    """The part of a name that gguf maps, and the ending that stays."""
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return (name.removesuffix("_bias"), ".bias") if name.endswith("_bias") else (name, ".weight")


def _layouts(weight: Weight, config: Any, family: GgufFamily) -> list[tuple[str, Layout]]:
    """Names as one expert or layer would have them in transformers, and what of the weight they are."""
    name = weight.name
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer = name.split(".")[-2] if "." in name else name
    if family.pairs_neighbours and layer in heads:
        return [(name, _paired(heads[layer]))]
    if family.norm_offset and name.endswith("norm.weight"):
        return [(name, lambda value: value.float() + family.norm_offset)]
    if ".experts." not in name:
        return [(name, _as_it_is)]
    is_turned = family.alternates_experts and weight.tensor.ndim == 3
    turned: Layout = (lambda value: value.mT) if is_turned else _as_it_is
    if "gate_up_proj" not in name:
        return [(name, turned)]
    parts = (_even, _odd) if family.alternates_experts else (_first_half, _second_half)
    return [
        (name.replace("gate_up_proj", new), lambda value, part=part: turned(part(value)))
        for new, part in zip(("gate_proj", "up_proj"), parts, strict=True)
    ]


def _paired(heads: int) -> Layout:
    """Rows i and i + head_dim / 2 of each head become neighbours, as llama.cpp's RoPE turns them."""
    return lambda value: value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _as_it_is(value: torch.Tensor) -> torch.Tensor:
    return value


def _first_half(value: torch.Tensor) -> torch.Tensor:
    return value.chunk(2, dim=1)[0]


def _second_half(value: torch.Tensor) -> torch.Tensor:
    return value.chunk(2, dim=1)[1]


def _even(value: torch.Tensor) -> torch.Tensor:
    return value[..., ::2]


def _odd(value: torch.Tensor) -> torch.Tensor:
    return value[..., 1::2]
