"""Where a model goes: one device, or its layers on several GPUs, within the limits that were set.

None, one device     that device
"auto"               one GPU where the model fits on one, else as "balanced"
"balanced"           as many layers on each GPU as makes the slowest as fast as possible
"sequential"         the first GPU is filled, then the next
a mapping            as it says
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast, get_args

from pantheraml.config.multi_gpu import PER_GPU
from pantheraml.devices.device_map import Kind, Placement, describe, interleaved, place
from pantheraml.devices.map_names import as_device_map, read_device_map
from pantheraml.devices.memory_limits import read_limits
from pantheraml.devices.visible_gpus import visible_memory
from pantheraml.errors import ConfigError
from pantheraml.log import say, say_once
from pantheraml.models.families import ModelFamily, find_family
from pantheraml.models.weight_sizes import measure_parts

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from pantheraml.devices.model_parts import ModelParts
    from pantheraml.models.precision import Precision
    from pantheraml.models.split import Split


@dataclass(frozen=True)
class Unplaced:
    """A model before it is loaded.

    Attributes:
        config: of the model.
        precision: how its weights will be held.
        full_finetuning: whether all of them are trained.
        tokens: of the longest row.
        fused: whether its layers will be fused.
        is_shared: whether ranks share it, so that none has to hold all of it.
    """

    config: PretrainedConfig
    precision: Precision
    full_finetuning: bool
    tokens: int
    fused: bool
    is_shared: bool = False

    @property
    def family(self) -> ModelFamily | None:
        """Its architecture as data."""
        return find_family(self.config)

    def parts(self) -> ModelParts | None:
        """Its sizes; None where no family describes it."""
        return measure_parts(
            self.config, self.precision, full_finetuning=self.full_finetuning, fused=self.fused
        )


@dataclass(frozen=True)
class Place:
    """Where a model goes.

    Attributes:
        device: of its embedding.
        device_map: as transformers takes it.
        split: the same, for a model on several GPUs whose family is known.
        limits: bytes that may be taken of each GPU, where somebody set them.
    """

    device: torch.device
    device_map: str | dict[str, Any]
    split: Split | None = None
    limits: Mapping[int, int] = field(default_factory=dict[int, int])


@dataclass(frozen=True)
class PipelineDevices:
    """What the layers of one model are split over.

    Attributes:
        devices: in the order of the stages; the CPU, which they share, where there are no GPUs.
        limits: bytes that may be taken of each GPU, the same on all ranks; empty on the CPU.
    """

    devices: tuple[torch.device, ...]
    limits: tuple[int, ...] = ()


def names_several(device_map: object, gpus: int) -> bool:
    """Whether ``device_map`` asks for more than one device, of ``gpus`` that are visible, whatever the model's size."""
    if isinstance(device_map, Mapping):
        return len({str(one) for one in cast("Mapping[object, object]", device_map).values()}) > 1
    return gpus > 1 and device_map in ("balanced", "sequential")


def first_device(device_map: object) -> torch.device:
    """The device that ``device_map`` means, or the first GPU where it means several."""
    from pantheraml.devices.inventory import num_gpus, resolve_device

    return resolve_device(None if names_several(device_map, num_gpus()) else device_map)


def find_place(
    model: Unplaced,
    device_map: object,
    max_memory: object,
    *,
    is_alone: bool,
    pipeline: PipelineDevices | None = None,
) -> Place:
    """The place of ``model``.

    Args:
        model: what is placed.
        device_map: what the user wrote.
        max_memory: likewise.
        is_alone: whether all visible GPUs are this process's; ranks have one each.
        pipeline: what it is split over in any case.

    Raises:
        ConfigError: the model does not fit, or the map or the limits cannot be.
        HardwareError: a device that is not there.
    """
    from pantheraml.devices.inventory import num_gpus, resolve_device

    if pipeline is not None:
        return _as_pipeline(model, pipeline, max_memory)
    gpus = num_gpus() if is_alone else 1
    if gpus > 1 and device_map == "balanced_low_0":
        raise ConfigError(
            got="device_map='balanced_low_0' was given.",
            need="It leaves the first GPU to what generates; in training every GPU has a share of the layers.",
            fix='Write device_map="balanced"; max_memory={0: "10GB", 1: "40GB"} leaves room on the first one.',
        )
    may_split = gpus > 1 and isinstance(device_map, str) and device_map in get_args(Kind)
    if not may_split and not names_several(device_map, gpus):
        device = resolve_device(device_map)
        return Place(device, {"": str(device)}, limits=_limit_of(model, device, max_memory))
    limits = read_limits(max_memory, visible_memory())
    if max_memory is not None and isinstance(max_memory, Mapping) and "cpu" in max_memory:
        say_once('max_memory: nothing is placed in host memory, so the limit for "cpu" is kept.')
    if model.family is None:
        say_once(
            "the layers of this architecture are placed by transformers, and compute one after the other: no family "
            "describes them."
        )
        return _place_by_transformers(device_map, limits, max_memory)
    if isinstance(device_map, Mapping):
        return _as_written(model, cast("Mapping[str, object]", device_map), limits, max_memory)
    return _as_planned(model, cast("Kind", device_map), limits, max_memory)


def _limit_of(model: Unplaced, device: torch.device, max_memory: object) -> dict[int, int]:
    """The limit of the only device, within which the model must fit unless ranks share it."""
    if max_memory is None:
        return {}
    limits = read_limits(max_memory, visible_memory())
    if device.index not in limits:
        raise ConfigError(
            got=f"max_memory does not name {device}, where the model goes.",
            need="GPUs that max_memory does not name are not used.",
            fix=f"Add a limit for {device.index}, or write device_map='auto' to use those that it names.",
        )
    limits = {device.index: limits[device.index]}
    parts = None if model.is_shared else model.parts()
    if parts is not None:
        place("sequential", parts, limits, tokens=model.tokens, micro_batches=1)
    return limits


def _place_by_transformers(device_map: object, limits: Mapping[int, int], max_memory: object) -> Place:
    import torch

    mapped = dict(device_map) if isinstance(device_map, Mapping) else str(device_map)
    return Place(torch.device("cuda", min(limits)), mapped, limits=limits if max_memory is not None else {})


def _as_pipeline(model: Unplaced, pipeline: PipelineDevices, max_memory: object) -> Place:
    """A stage on each device of a pipeline."""
    stages, family = len(pipeline.devices), model.family
    if family is None:
        raise ConfigError(
            got=f"A pipeline of {stages} stages was asked for, and no family describes this architecture.",
            need="The stages of a pipeline are cut where a family says that the layers are.",
            fix='Leave pipeline_parallel out; device_map="balanced" splits such a model, whose GPUs compute in turn.',
        )
    layers = int(model.config.get_text_config().num_hidden_layers)
    if layers < stages:
        raise ConfigError(
            got=f"A pipeline of {stages} stages was asked for, and the model has {layers} layers.",
            need="Each stage has a layer or more.",
            fix=f"Write pipeline_parallel={layers}."
            if layers > 1
            else "Leave it out: every GPU can have a copy.",
        )
    if pipeline.limits:
        gpus = [device.index for device in pipeline.devices]
        limits = dict(zip(gpus, pipeline.limits, strict=True))
        return _as_planned(model, "balanced", limits, max_memory)
    from pantheraml.models.split import Split

    say_once(f"there is no GPU, so the {stages} stages of the model share the CPU.")
    device = pipeline.devices[0]
    return Place(device, {"": str(device)}, Split.in_equal_stages(layers, stages, device))


def _as_planned(model: Unplaced, kind: Kind, limits: Mapping[int, int], max_memory: object) -> Place:
    parts = model.parts()
    assert parts is not None
    step = dict(tokens=model.tokens, micro_batches=PER_GPU * len(limits))
    found = place(kind, parts, limits, **step)
    if kind != "sequential":
        found = interleaved(found, parts, **step) or found
    say(f"device_map={kind!r} (GiB, with micro-batches of {model.tokens} tokens)\n{describe(found, parts)}")
    return _as_place(found, cast("ModelFamily", model.family), limits if max_memory is not None else {})


def _as_written(
    model: Unplaced, mapping: Mapping[str, object], limits: Mapping[int, int], max_memory: object
) -> Place:
    family = cast("ModelFamily", model.family)
    text = model.config.get_text_config()
    found = read_device_map(
        mapping, family, text.num_hidden_layers, tied=bool(getattr(text, "tie_word_embeddings", False))
    )
    _check_are_there(found, limits, max_memory)
    return _as_place(found, family, limits if max_memory is not None else {})


def _check_are_there(found: Placement, limits: Mapping[int, int], max_memory: object) -> None:
    from pantheraml.devices.inventory import gpu_device

    for gpu in found.gpus:
        gpu_device(gpu)
        if gpu not in limits:
            raise ConfigError(
                got=f"device_map uses GPU {gpu}, which max_memory={max_memory!r} does not name.",
                need="GPUs that max_memory does not name are not used.",
                fix=f"Add a limit for {gpu}, or leave max_memory out.",
            )


def _as_place(found: Placement, family: ModelFamily, limits: Mapping[int, int]) -> Place:
    import torch

    from pantheraml.models.split import Split

    device = torch.device("cuda", found.embedding)
    if len(found.gpus) == 1:
        return Place(device, {"": str(device)}, limits=limits)
    layers = [torch.device("cuda", gpu) for gpu in found.layers]
    split = Split.of_layers(layers, device, torch.device("cuda", found.head))
    return Place(device, as_device_map(found, family), split, limits)
