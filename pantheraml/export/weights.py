"""The weights a trained model stands for, by the names they have in the plain model.

``plain_weights`` walks a model through every wrapper that PEFT put into it and lists what the same
model without PEFT would hold. Nothing is computed until ``Weight.values`` is called, and the live model
is only read: no merging into it and out again, which would not give the same bits back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pantheraml.errors import AdapterError, ModelLoadError
from pantheraml.export.gathering import whole
from pantheraml.export.lora import AdapterLayer, add_adapter, check_mergeable
from pantheraml.export.quantized import is_4bit, is_8bit, is_fp8, is_turned, stored_values
from pantheraml.models.fp8 import Fp8Linear
from pantheraml.models.sharded_linear import ShardedLinear


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of the plain model.

    Attributes:
        name: its key in the plain model's ``state_dict``.
        module: the layer that owns it, without adapters.
        attribute: its name in ``module``.
        adapters: the adapter layers that change it, innermost first.
    """

    name: str
    module: nn.Module
    attribute: str
    adapters: tuple[AdapterLayer, ...] = ()

    @property
    def tensor(self) -> Any:
        """The stored tensor, which may be a quantised parameter of bitsandbytes."""
        return getattr(self.module, self.attribute)

    @property
    def shape(self) -> torch.Size:
        """Shape in the plain model."""
        if isinstance(self.module, ShardedLinear):
            return self.module.whole_shape(self.attribute)
        shape = self.tensor.quant_state.shape if is_4bit(self.tensor) else self.tensor.shape
        return torch.Size(reversed(shape) if is_turned(self.module, self.tensor) else shape)

    @property
    def is_parameter(self) -> bool:
        """False for buffers."""
        return self.attribute in self.module._parameters

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``values`` would have without adapters."""
        if is_4bit(self.tensor):
            return self.tensor.quant_state.dtype
        is_scaled = is_8bit(self.tensor) or is_fp8(self.module, self.tensor)
        return torch.float32 if is_scaled else self.tensor.dtype

    def values(self) -> torch.Tensor:
        """The weight as the live model uses it; where ranks share it out, all of them have to ask for it.

        Returns:
            Float32 where adapters, 8-bit or FP8 storage are involved, else the stored dtype (perhaps sharing
            memory with the model). On the model's device, or on the CPU when that is short of memory.
        """
        try:
            return self._values_on(self.tensor.device)
        except torch.OutOfMemoryError:
            if isinstance(self.tensor, DTensor):  # the other ranks would gather once, and this one twice
                raise
            torch.cuda.empty_cache()
            return self._values_on(torch.device("cpu"))

    @torch.no_grad()
    def _values_on(self, device: torch.device) -> torch.Tensor:
        if isinstance(self.module, ShardedLinear):
            value = whole(self.module, self.attribute)
        else:
            value = stored_values(self.module, self.tensor)
        if self.adapters:
            value = value.to(device, torch.float32, copy=True)
            with torch.autocast(device.type, enabled=False):
                for adapter in self.adapters:
                    add_adapter(adapter, self.attribute, value)
        return value.T if is_turned(self.module, self.tensor) else value


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's, DDP's and ``torch.compile``'s wrappers.

    Raises:
        ModelLoadError: there is no transformers model inside.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise ModelLoadError(
            got=f"This is a {type(model).__name__}.",
            need="Only transformers models, with or without PEFT adapters, can be saved and exported.",
            fix="Pass the model that FastLanguageModel.from_pretrained or get_peft_model returned.",
        )
    return inner


def plain_weights(model: nn.Module, trained: bool = True) -> Iterator[Weight]:
    """Every parameter and persistent buffer of the plain model, in the order of its ``state_dict``.

    Args:
        model: a transformers model, or a PEFT model around one.
        trained: with what the active adapters changed; False gives the base model as it was loaded.

    Raises:
        AdapterError: an adapter is of a kind that cannot be written into the weights.
    """
    wrapped = extract_model_from_parallel(model, keep_torch_compile=False)
    active: Any = getattr(wrapped, "active_peft_config", None)
    if trained and getattr(active, "is_prompt_learning", False):
        raise AdapterError(
            got=f"The adapter is a {active.peft_type.value} adapter.",
            need="It lives beside the weights, in virtual tokens, and cannot be merged into them.",
            fix="Use save_method='lora', which saves the adapter itself.",
        )
    yield from _walk(plain_model(model), "", (), trained)


def without_adapters(module: Any) -> nn.Module:
    """The base model's own layer inside PEFT's wrappers."""
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def _walk(module: Any, prefix: str, adapters: tuple[AdapterLayer, ...], trained: bool) -> Iterator[Weight]:
    if not trained:
        module = without_adapters(module)
    if isinstance(module, ModulesToSaveWrapper):
        yield from _walk(_module_in_use(module), prefix, adapters, trained)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _walk(module.token_adapter, prefix, adapters, trained)
    elif isinstance(module, BaseTunerLayer):
        check_mergeable(module, prefix.removesuffix("."))
        adapter: AdapterLayer = module
        yield from _walk(adapter.base_layer, prefix, (adapter, *adapters), trained)
    else:
        buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        if isinstance(module, Fp8Linear):  # the plain layer has no scales
            buffers.remove("weight_scale")
        for name in (*module._parameters, *buffers):
            if getattr(module, name) is not None:
                yield Weight(f"{prefix}{name}", module, name, _adapters_of(name, adapters))
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{prefix}{name}.", (), trained)


def _module_in_use(wrapper: Any) -> nn.Module:
    """What the forward pass uses: the trained copy of the active adapter, or the original."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[wrapper.active_adapters[0]]


def _adapters_of(name: str, adapters: tuple[AdapterLayer, ...]) -> tuple[AdapterLayer, ...]:
    """Those of ``adapters`` that change the tensor ``name`` of the layer they stand around."""

    def changes(adapter: AdapterLayer) -> bool:
        if hasattr(adapter, "parameter_name"):
            return name == adapter.parameter_name
        if name == "bias":
            return isinstance(adapter, LoraLayer) and any(adapter.lora_bias.values())
        return name == "weight"

    return tuple(
        adapter
        for adapter in adapters
        if changes(adapter) and not adapter.disable_adapters and not adapter.merged
    )
