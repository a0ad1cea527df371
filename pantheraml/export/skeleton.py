"""The plain model without its weights: what will be loaded from a merged folder.

It answers what only transformers knows: which keys the model has, which are tied, which layers a 4-bit
load would quantise, and how keys in memory are called in a checkpoint.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers import AutoHfQuantizer

from pantheraml.models.sharding import own_class


def build_skeleton(model: PreTrainedModel, dtype: torch.dtype, tied: bool) -> PreTrainedModel:
    """A model of the same class on the meta device, with a configuration of its own.

    Args:
        model: the live plain model; only read.
        dtype: what the configuration will say the weights are in.
        tied: whether input and output embeddings are still one tensor.
    """
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in (config, config.get_text_config()):
        if not tied and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    config.dtype = dtype
    config.architectures = [own_class(model).__name__]
    with torch.device("meta"):
        skeleton: Any = own_class(model)(config)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        # A model loaded from a quantised checkpoint also remembers how its weights were unpacked: that
        # has no way back, and plain weights need none.
        skeleton._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(step, "hf_quantizer") for step in getattr(conversion, "operations", ()))
        ]
    return skeleton


def quantize_skeleton(skeleton: PreTrainedModel, skip_modules: list[str] | None) -> set[str]:
    """Prepare ``skeleton`` for NF4 with double quantisation, as loading the result will.

    Args:
        skeleton: changed in place, its configuration too.
        skip_modules: layers to leave alone; None for transformers' own choice (the output head).

    Returns:
        Names of the weights that are stored in 4 bits.
    """
    from bitsandbytes.nn import Linear4bit

    skeleton.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=skeleton.config.dtype,
        llm_int8_skip_modules=skip_modules,
    )
    quantizer = AutoHfQuantizer.from_config(skeleton.config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(skeleton, device_map=None)
    return {f"{name}.weight" for name, layer in skeleton.named_modules() if isinstance(layer, Linear4bit)}


def checkpoint_tensors(
    skeleton: PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``tensors`` by the names, and in the pieces, of the model's published checkpoints.

    Args:
        skeleton: from ``build_skeleton``.
        tensors: all tensors of one layer, so that what belongs together is together.
    """
    return revert_weight_conversion(skeleton, tensors)


def kept_in_float32(skeleton: PreTrainedModel, dtype: torch.dtype) -> tuple[str, ...]:
    """Parts of parameter names that the architecture keeps in float32 when loaded in ``dtype``."""
    return tuple(skeleton._get_dtype_plan(dtype))


def layer_of(name: str) -> str:
    """The repeated block a tensor belongs to (``model.layers.3``), empty for what is outside of them."""
    head: list[str] = []
    for part in name.split("."):
        head.append(part)
        if part.isdigit():
            return ".".join(head)
    return ""


def source_is_turned(skeleton: nn.Module, weight_name: str) -> bool:
    """Whether 4-bit storage of this weight turns it around (GPT-2's ``Conv1D``)."""
    layer = skeleton.get_submodule(weight_name.removesuffix(".weight"))
    return layer.source_cls is not nn.Linear
