"""Which linear layers are cut between ranks that compute each layer together, by transformers' own plan.

The plan of an architecture names, in every decoder layer, those cut by rows ("colwise": of the output) and by columns
("rowwise"). Norms, the embedding and the head stay whole on every rank. A model is built without weights, its layers
are swapped for parts of them, and transformers reads of each weight the part that is this rank's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pantheraml.config.combinations import STORED, refusal
from pantheraml.errors import ConfigError
from pantheraml.models.sharded_linear import (
    ColumnLinear,
    FactorOfColumn,
    FactorOfRow,
    RowLinear,
    ShardedLinear,
    tensor_group_of,
)
from pantheraml.models.tensor_group import TensorGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from pantheraml.models.patching import PatchSet
    from pantheraml.models.precision import Precision

_KINDS: dict[str, type[ShardedLinear]] = {"colwise": ColumnLinear, "rowwise": RowLinear}
# Norms of single heads: as they are where they are not trained.
_WHOLE = "replicated_with_grad_allreduce"
_WHY = "layers are cut between ranks, and are computed by transformers' code"


@dataclass(frozen=True)
class Sharding:
    """How a model is cut.

    Attributes:
        kind: transformers' class of the model.
        layers: the class of each linear layer that is cut, by its path.
        group: the ranks.
    """

    kind: type[PreTrainedModel]
    layers: dict[str, type[ShardedLinear]]
    group: TensorGroup

    def loading_class(self, device_type: str) -> Any:
        """``kind``, whose layers are cut as soon as it is built: their weights are placeholders, as DTensors.

        transformers reads of a weight what is this rank's part of such a placeholder.
        """
        mesh = DeviceMesh.from_group(self.group.process_group, device_type)
        build, layers, group = self.kind.__init__, self.layers, self.group

        def __init__(model: Any, *args: Any, **kwargs: Any) -> None:
            build(model, *args, **kwargs)
            for number, (path, cut) in enumerate(layers.items()):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, cut(model.get_submodule(path), group, number))
                _place(model.get_submodule(path), mesh)

        members = {
            "__init__": __init__, "__module__": self.kind.__module__, "__qualname__": self.kind.__qualname__
        }  # fmt: skip
        return type(self.kind.__name__, (self.kind,), members)

    def settle(self, model: Any) -> None:
        """Make plain tensors of the parts, and a model of its own class of one that ``loading_class`` has loaded."""
        for layer in model.modules():
            if not isinstance(layer, ShardedLinear):
                continue
            for name, value in list(layer.named_parameters(recurse=False)):
                if isinstance(value, DTensor):
                    setattr(layer, name, nn.Parameter(value.to_local(), requires_grad=value.requires_grad))
        model.__class__ = self.kind


def _place(layer: Any, mesh: DeviceMesh) -> None:
    for name, value in list(layer.named_parameters(recurse=False)):
        if layer.is_cut(name):
            part = distribute_tensor(value, mesh, [Shard(layer.dim)], src_data_rank=None)
            setattr(layer, name, nn.Parameter(part, requires_grad=value.requires_grad))


def plan_sharding(
    auto: Any, config: PretrainedConfig, precision: Precision, group: TensorGroup, *, trust_remote_code: bool
) -> Sharding:
    """How the model of ``config`` is cut between the ranks of ``group``.

    Args:
        auto: transformers' Auto class of the model.
        config: only read.
        precision: how weights are held.
        group: the ranks.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: it cannot be cut, or not between so many ranks.
    """
    if precision.storage != "plain":
        raise refusal(
            "tensor",
            STORED[precision.storage],
            f"tensor_parallel={group.size} was given for {precision.storage} weights.",
        )
    with torch.device("meta"):
        skeleton = auto.from_config(config, trust_remote_code=trust_remote_code)
    what = f"tensor_parallel={group.size} was given for a {config.model_type} model"
    plan: dict[str, str] = {name: style for name, style in skeleton.tp_plan.items() if "*" in name}
    if any(".experts" in name for name in plan) or _num_experts(config):
        raise refusal("tensor", "experts", f"{what}, a mixture of experts.")
    other = sorted({*plan.values()} - {*_KINDS, _WHOLE})
    if not plan or other:
        found = (
            f"whose plan joins what ranks computed ({', '.join(other)})"
            if other
            else "which has no plan for it"
        )
        raise refusal("tensor", "no plan", f"{what}, {found}.")
    layers = {
        path: _KINDS[style]
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and (style := plan.get(_generic(path))) in _KINDS
    }
    _check_degree(
        group.size, config, [skeleton.get_submodule(path) for path in layers], list(layers.values())
    )
    return Sharding(type(skeleton), layers, group)


def _generic(path: str) -> str:
    """``model.layers.*.mlp.up_proj`` for that of any layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _num_experts(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    return getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0


def _check_degree(
    degree: int, config: PretrainedConfig, linears: list[Any], kinds: list[type[ShardedLinear]]
) -> None:
    """Refuse a degree that does not divide heads and widths, and name those that do."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
    }
    if getattr(text, "intermediate_size", None):
        sizes["intermediate_size"] = text.intermediate_size
    cut = {(one.out_features, one.in_features)[kind.dim] for one, kind in zip(linears, kinds, strict=True)}
    valid = [n for n in range(2, heads + 1) if not any(size % n for size in (*sizes.values(), *cut))]
    if degree in valid:
        return
    said = " and ".join(", ".join(f"{name}={size}" for name, size in sizes.items()).rsplit(", ", 1))
    names = ", ".join(map(str, valid))
    raise ConfigError(
        got=f"tensor_parallel={degree} was given for a {config.model_type} model with {said}.",
        need="Every rank has as many heads and as much of an MLP: the degree divides these numbers.",
        fix=f"Write tensor_parallel={valid[0]}; valid degrees are {names}."
        if len(valid) > 1
        else f"Write tensor_parallel={valid[0]}, the only valid degree."
        if valid
        else 'No degree does; write strategy="fsdp", or strategy="ddp" if a GPU holds the model.',
    )


def check_adapter_settings(model: nn.Module, settings: dict[str, Any]) -> None:
    """Refuse, for a model whose layers are cut, what an adapter needs whole weights for.

    Args:
        model: the base model.
        settings: of ``get_peft_model``, or of a saved adapter.

    Raises:
        ConfigError: something that does.
    """
    group = tensor_group_of(model)
    if group is None:
        return
    start = settings.get("init_lora_weights", True)
    given = {
        "use_dora": settings.get("use_dora"),
        "init_lora_weights": isinstance(start, str) and start not in ("gaussian", "orthogonal"),
        "bias": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "modules_to_save": _sees_parts(model, settings.get("modules_to_save") or ()),
        "target_parameters": settings.get("target_parameters"),
    }
    for feature, is_given in given.items():
        if is_given:
            name = "lora_bias" if feature == "bias" and settings.get("bias", "none") == "none" else feature
            raise refusal(
                "tensor",
                feature,
                f"{name}={settings[name]!r} was given to ranks that compute each layer together.",
            )


def _sees_parts(model: Any, names: Any) -> bool:
    """Whether one of the modules with these last names has a layer that is cut, or is given what such a one gave."""
    return any(
        tensor_group_of(module) is not None or model.tp_plan.get(_generic(path)) == _WHOLE
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names
    )


def share_factors(model: nn.Module, patches: PatchSet) -> None:
    """Let every adapter of a layer that is cut compute with the part of its factors that is this rank's.

    Args:
        model: with adapters; each factor is whole on every rank.
        patches: the ledger.
    """
    from peft.tuners.lora.layer import LoraLayer

    adapted = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for path, layer in adapted:
        base = layer.get_base_layer()
        if not isinstance(base, ShardedLinear):
            continue
        side, kind = ("lora_B", FactorOfColumn) if base.dim == 0 else ("lora_A", FactorOfRow)
        for name, factor in list(getattr(layer, side).items()):
            if not isinstance(factor, FactorOfColumn | FactorOfRow):
                patches.replace(model, f"{path}.{side}.{name}", kind(factor, base.group), _WHY)
