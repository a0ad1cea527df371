"""A model whose layers lie on several devices: where each part is, and the hooks that bring tensors there.

With the hooks the model computes as ever, whoever calls it: one stage after the other. They leave the model's class and
its forward alone. Training goes through ``distributed/pipeline`` instead, where stages compute at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from pantheraml.models.families import ModelFamily


@dataclass(frozen=True)
class StagePlace:
    """Neighbouring layers on one device.

    Attributes:
        first: index of the first layer.
        stop: index after the last one.
        device: where they are.
    """

    first: int
    stop: int
    device: torch.device


@dataclass(frozen=True)
class Split:
    """Where the parts of a model are.

    Attributes:
        stages: its layers, in order, none left out.
        embedding: device of the token embedding.
        head: device of the last norm and of the head.
        rounds: how many of the stages each device has; the devices take turns.
    """

    stages: tuple[StagePlace, ...]
    embedding: torch.device
    head: torch.device
    rounds: int = 1

    @classmethod
    def of_layers(cls, layers: Sequence[torch.device], embedding: torch.device, head: torch.device) -> Split:
        """The split whose layer ``i`` is on ``layers[i]``."""
        starts = [0, *(i for i in range(1, len(layers)) if layers[i] != layers[i - 1]), len(layers)]
        stages = tuple(StagePlace(first, stop, layers[first]) for first, stop in pairwise(starts))
        return cls(stages, embedding, head, rounds=len(stages) // len(set(layers)))

    @classmethod
    def in_equal_stages(cls, layers: int, stages: int, device: torch.device) -> Split:
        """So many stages of ``layers`` layers, as equal as can be, all on one device."""
        bounds = [layers * stage // stages for stage in range(stages + 1)]
        return cls(tuple(StagePlace(first, stop, device) for first, stop in pairwise(bounds)), device, device)

    @property
    def num_gpus(self) -> int:
        """Devices that layers are on."""
        return len(self.stages) // self.rounds

    @property
    def num_layers(self) -> int:
        """All layers."""
        return self.stages[-1].stop

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device that holds a part, each once, in the order of the stages."""
        found = [stage.device for stage in self.stages]
        return tuple(dict.fromkeys([*found, self.embedding, self.head]))

    def describe(self) -> str:
        """One clause for the log."""
        stages = [f"layers {one.first}-{one.stop - 1} on {one.device}" for one in self.stages]
        return f"embedding on {self.embedding}, {', '.join(stages)}, head on {self.head}"


def is_split(model: nn.Module) -> bool:
    """Whether ``model`` was loaded to several devices, by us or by transformers."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    return len(set(places.values())) > 1


@contextmanager
def without_device_map(model: nn.Module) -> Iterator[None]:
    """A block in which nothing shows that ``model`` is on several devices: accelerate refuses such ones to ranks."""
    name = "hf_device_map"
    told = [(module, vars(module).pop(name)) for module in model.modules() if name in vars(module)]
    try:
        yield
    finally:
        for module, places in told:
            setattr(module, name, places)


def carry_between(model: Any, family: ModelFamily, split: Split) -> None:
    """Hook ``model`` (a causal language model) so that tensors follow the split; its logits come back to the caller.

    Args:
        model: its parts are where ``split`` says.
        family: where they are called what.
        split: more than one device.
    """
    entrance = _Entrance(split.embedding)
    backbone = model.get_submodule(family.layers.rpartition(".")[0])
    backbone.register_forward_pre_hook(entrance.enter, with_kwargs=True)
    backbone.register_forward_hook(entrance.leave, always_call=True)
    layers = list(model.get_submodule(family.layers).children())
    for stage in split.stages:
        carrier = _Carrier(stage.device)
        for index in range(stage.first, stage.stop):
            if index == stage.first:
                layers[index].register_forward_pre_hook(carrier.begin)
            layers[index].register_forward_pre_hook(carrier.bring, with_kwargs=True)
    for path in (family.final_norm, family.head):
        model.get_submodule(path).register_forward_pre_hook(_Carrier(split.head).bring_one)
    model.get_submodule(family.head).register_forward_hook(entrance.bring_back)


def drop_hooks(model: nn.Module) -> None:
    """Remove what transformers hooks into a model that it loads to several devices; ours copy less."""
    remove_hook_from_submodules(model)
    for module in model.modules():
        vars(module).pop("forward", None)  # the class's own, put back on the instance


class _Entrance:
    """Brings a call's tensors to the embedding, and its logits back to where it came from.

    The device that is current changes on the way, and is what it was afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = self._caller = device
        self._current: int | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        self._caller = tensors[0].device if tensors else self._device
        self._current = torch.cuda.current_device() if self._device.type == "cuda" else None
        return _moved(args, self._device), {name: _moved(one, self._device) for name, one in kwargs.items()}

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._current is not None:
            torch.cuda.set_device(self._current)

    def bring_back(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        return logits.to(self._caller)


class _Carrier:
    """Brings what the layers of a stage are given to their device; what they share is brought once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._brought: dict[int, tuple[Any, Any]] = {}

    def begin(self, module: nn.Module, args: Any) -> None:
        self._brought.clear()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # kernels of other libraries run on the current one

    def bring(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _moved(args, self._device), {name: self._once(one) for name, one in kwargs.items()}

    def bring_one(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return _moved(args, self._device)

    def _once(self, value: Any) -> Any:
        if not isinstance(value, Tensor | tuple):
            return value
        # Held beside what was made of it, the value keeps its id.
        known = self._brought.get(id(value))
        if known is None:
            known = self._brought[id(value)] = value, _moved(value, self._device)
        return known[1]


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``, in tuples too; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is tuple:
        return tuple(_moved(one, device) for one in value)
    return value
