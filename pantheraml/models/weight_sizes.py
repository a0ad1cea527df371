"""How many bytes each part of a model will hold on its device, known before anything is loaded.

The model is built without weights, on the meta device: its modules and the rules of quantisation say exactly what will
be there. (A checkpoint whose weights have other names or shapes than its configuration asks for is refused by loading.)
Nothing here touches a GPU, nor imports bitsandbytes, which does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pantheraml.devices.activations import ActivationSizes
from pantheraml.devices.model_parts import ModelParts, PartSizes
from pantheraml.devices.optimizer_states import moment_bytes
from pantheraml.models.activation_sizes import activation_sizes
from pantheraml.models.families import ModelFamily, find_family
from pantheraml.models.precision import Precision

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

# bitsandbytes: values that share a scale, and scales that share one when they are quantised again.
_BLOCK, _OUTER_BLOCK = 64, 256
# float32 tables of the 16 values of a 4-bit number, and of the 256 of a quantised scale.
_TABLE, _OUTER_TABLE = 4 * 16, 4 * 256
_SCALE = 4  # bytes
# Bytes of a number of the adapter, of its gradient, and of a moment.
_MASTER = 4


@dataclass
class _Count:
    """What was found of one part: bytes held, numbers, numbers a token is multiplied by, what is trained."""

    weights: int = 0
    numbers: int = 0
    used: float = 0.0
    trainable: int = 0
    trained: int = 0


def measure_parts(
    config: PretrainedConfig,
    precision: Precision,
    *,
    full_finetuning: bool = False,
    rank: int = 16,
    fused: bool = True,
    optim: str = "adamw_torch",
) -> ModelParts | None:
    """The parts of the causal language model that loading ``config`` in ``precision`` will build.

    Args:
        config: from ``load_config``; only read. What it says of stored quantisation counts.
        precision: how weights are held.
        full_finetuning: all weights are trained; else a LoRA adapter on all default targets.
        rank: of that adapter.
        fused: whether decoder layers will be fused, which keep less (True on GPUs unless ``kernels="off"``).
        optim: transformers' name of the optimizer, whose moments count to what training adds.

    Returns:
        The parts, or None for an architecture that no family describes.
    """
    family = find_family(config)
    if family is None:
        return None
    skeleton = _build(config, precision)
    size_of = _size_rule(skeleton, config, precision)
    layers = [_Count() for _ in skeleton.get_submodule(family.layers).children()]
    embedding, head = _Count(), _Count()

    def count_of(name: str) -> _Count:
        if name.startswith(f"{family.layers}."):
            return layers[int(name.removeprefix(f"{family.layers}.").split(".")[0])]
        is_first = any(name.startswith(f"{path}.") for path in (family.embedding, *family.not_text))
        # Rotary angles, a few hundred bytes, are counted with the norm, wherever they are.
        return embedding if is_first else head

    for name, weight in skeleton.named_parameters():
        count = count_of(name)
        count.weights += size_of(name, weight)
        count.numbers += weight.numel()
        count.used += _used(name, weight, config, family)
        if full_finetuning:
            count.trainable += weight.numel()
            count.trained += weight.numel() * (weight.itemsize + moment_bytes(optim, weight.itemsize))
    for name, buffer in skeleton.named_buffers():
        count_of(name).weights += buffer.nbytes
    if not full_finetuning:
        for name, numbers in _adapter_numbers(skeleton, family, rank):
            count = count_of(name)
            count.trainable += numbers
            count.trained += numbers * (2 * _MASTER + moment_bytes(optim, _MASTER))
    is_tied = skeleton.get_input_embeddings().weight is skeleton.get_output_embeddings().weight
    trained_in = min(precision.dtype.itemsize, 2) if full_finetuning else 0
    sizes = activation_sizes(
        config,
        precision.dtype.itemsize,
        is_fused=fused and precision.storage != "8bit",
        has_head_norms=bool(family.head_norms),
        has_post_norms="sandwich_norm" in family.deviations,
        rank=rank,
        trained_in=trained_in,
    )
    return _as_parts(embedding, layers, head, _Facts(sizes, precision, is_tied))


@dataclass(frozen=True)
class _Facts:
    """What of a model is not counted weight by weight."""

    sizes: ActivationSizes
    precision: Precision
    is_tied: bool


def _as_parts(embedding: _Count, layers: list[_Count], head: _Count, facts: _Facts) -> ModelParts:
    average = sum(layer.used for layer in layers) / len(layers)
    activations = facts.sizes

    def part(count: _Count, used: float) -> PartSizes:
        return PartSizes(count.weights, count.trained, used / average, count.numbers, count.trainable)

    return ModelParts(
        # Rows are looked up, not multiplied. A tied head multiplies by all of them.
        embedding=part(embedding, 0.0),
        layers=tuple(part(one, one.used) for one in layers),
        head=part(head, float(activations.vocabulary * activations.hidden)),
        tied=facts.is_tied,
        kept_per_token=activations.kept.all,
        kept_when_recomputing=activations.kept.attended,
        # What is computed again of transformers' own layers comes and goes as a whole.
        layer_passing=partial(activations.layer_passing, recomputes=not activations.computes_fused),
        head_passing=activations.head_passing,
        is_4bit=facts.precision.storage == "4bit",
        activations=activations,
        storage=facts.precision.storage,
        full_finetuning=activations.is_trained,
        trained_size=facts.precision.dtype.itemsize if activations.is_trained else _MASTER,
        used=average,
    )


def _build(config: PretrainedConfig, precision: Precision) -> Any:
    """The plain model on the meta device, in the dtypes that its weights will have."""
    import torch
    from transformers import AutoModelForCausalLM

    plain: Any = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(plain, dtype=precision.dtype)
    kept = skeleton._get_dtype_plan(precision.dtype)
    for name, weight in skeleton.named_parameters():
        for part, dtype in kept.items():
            if part in name.split("."):
                weight.data = weight.data.to(dtype)
    return skeleton


def _size_rule(
    skeleton: Any, config: PretrainedConfig, precision: Precision
) -> Callable[[str, torch.Tensor], int]:
    """A function of a parameter's name and itself: bytes it will hold, scales included."""
    if precision.storage == "plain":
        return lambda _, weight: weight.nbytes
    if precision.storage == "fp8":
        from pantheraml.models.fp8 import fp8_linears

        quantised, packed = fp8_linears(skeleton), _packed_bytes
    else:
        stored: dict[str, Any] = getattr(config, "quantization_config", None) or {}
        quantised = _bitsandbytes_linears(skeleton, stored.get("llm_int8_skip_modules"))
        is_double = stored.get("bnb_4bit_use_double_quant", not stored)
        packed = (
            (_double_packed_bytes if is_double else _four_bit_bytes)
            if precision.storage == "4bit"
            else _packed_bytes
        )
    weights = {f"{path}.weight" for path in quantised}
    return lambda name, weight: packed(weight) if name in weights else weight.nbytes


def _bitsandbytes_linears(skeleton: Any, skip_modules: list[str] | None) -> list[str]:
    """Paths of the linears that transformers lets bitsandbytes hold."""
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(skeleton, skip_modules, skeleton._keep_in_fp32_modules)
    return [
        path
        for path, layer in skeleton.named_modules()
        if type(layer) is nn.Linear and should_convert_module(path, kept)
    ]


def _packed_bytes(weight: torch.Tensor) -> int:
    """8 bits: int8 or e4m3, and a float32 scale for each row."""
    return weight.numel() + _SCALE * weight.shape[0]


def _four_bit_bytes(weight: torch.Tensor) -> int:
    """4 bits, a float32 scale for each block, and the table of values."""
    return -(-weight.numel() // 2) + _SCALE * _blocks(weight) + _TABLE


def _double_packed_bytes(weight: torch.Tensor) -> int:
    """4 bits, a scale of one byte for each block, scales and an offset of these in float32, and both tables."""
    outer = _SCALE * -(-_blocks(weight) // _OUTER_BLOCK) + _OUTER_TABLE + _SCALE
    return -(-weight.numel() // 2) + _blocks(weight) + _TABLE + outer


def _blocks(weight: torch.Tensor) -> int:
    return -(-weight.numel() // _BLOCK)


def _used(name: str, weight: torch.Tensor, config: PretrainedConfig, family: ModelFamily) -> float:
    """Numbers of a weight that one token is multiplied by: of experts, those it is sent to."""
    if not any(name.endswith(f".{path}") for path in family.target_parameters):
        return float(weight.numel()) if weight.dim() > 1 else 0.0
    chosen = config.get_text_config().num_experts_per_tok
    return weight.numel() * chosen / weight.shape[0]


def _adapter_numbers(skeleton: nn.Module, family: ModelFamily, rank: int) -> Iterator[tuple[str, int]]:
    """(name of a weight, numbers of its adapter) for all default targets: r (in + out), for each expert."""
    # PEFT takes the names of experts' weights from layers without experts.
    modules = {*family.target_modules} - family.expert_projections.keys()
    for name, weight in skeleton.named_parameters():
        if not name.startswith(f"{family.layers}."):
            continue
        is_linear = name.endswith(".weight") and name.split(".")[-2] in modules
        if is_linear or any(name.endswith(f".{path}") for path in family.target_parameters):
            yield name, rank * sum(weight.shape[-2:]) * math.prod(weight.shape[:-2])
