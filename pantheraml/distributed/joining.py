"""What ``from_pretrained`` makes of several GPUs: ranks with a copy each, a split model in one process, or one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pantheraml.config.combinations import REFUSED, refusal
from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.devices.memory_limits import read_limits
from pantheraml.devices.visible_gpus import visible_memory
from pantheraml.distributed.automatic import copies_fit, layout_of_ranks, why_split
from pantheraml.distributed.data_ranks import tensor_group
from pantheraml.distributed.process_group import (
    gather_objects,
    get_world_size,
    group_size,
    rank_devices,
    settings_of_run,
    setup_multi_gpu,
)
from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.gpus import num_visible_gpus
from pantheraml.launch.start import say_what_is_idle
from pantheraml.log import say
from pantheraml.models.placement import PipelineDevices, names_several

if TYPE_CHECKING:
    from pantheraml.models.request import LoadRequest


def join(
    request: LoadRequest, use_multi_gpu: bool | MultiGPUConfig | None, auto_device_map: bool
) -> LoadRequest:
    """Be what the arguments make of this process; a plain script may start its ranks here and not come back.

    Args:
        request: what is to be loaded.
        use_multi_gpu: as in ``from_pretrained``.
        auto_device_map: likewise.

    Returns:
        The request, as this process is to fulfil it.

    Raises:
        ConfigError: arguments that contradict each other, or what started this process.
    """
    config = None if use_multi_gpu in (None, False) else config_of(use_multi_gpu)
    if use_multi_gpu is True or (use_multi_gpu is None and settings_of_run().way == "pipeline"):
        config = settings_of_run()  # as setup_multi_gpu was told
    request = replace(request, max_memory=_one_max_memory(request, config))
    if config is not None and config.way == "pipeline":
        return _as_pipeline(request, config)
    is_automatic = request.device_map == "auto" or (request.device_map is None and auto_device_map)
    if is_automatic:
        request = replace(request, device_map="auto")
    if use_multi_gpu is False:
        return request
    gpus = num_visible_gpus() or 0
    is_split = names_several(request.device_map, gpus)
    if is_split and config is not None and config.way == "tensor":
        raise refusal(
            "tensor",
            "device_map",
            f"device_map={request.device_map!r} and tensor_parallel were given together.",
        )
    if LaunchEnvironment.detect().is_rank:
        return _as_rank(request, config, is_split)
    if config is None:
        if not is_split and not is_automatic:
            say_what_is_idle()
        return request
    if config.strategy != "none" and is_split:
        say(
            f"device_map={request.device_map!r} splits the model, so this process uses all GPUs and starts no ranks."
        )
        return request
    may_split = is_automatic or (request.device_map is None and config.auto_device_map)
    why_not_rerun = LaunchEnvironment.detect().why_not_rerun
    if why_not_rerun is not None and may_split and gpus > 1 and config.way == "auto":
        say(
            f"{why_not_rerun}: the model is split over {gpus} GPUs instead. notebook_launch(fn) runs a function on a "
            "rank for each, which is faster where one GPU holds the model."
        )
        return replace(request, device_map="balanced")
    if config.way == "auto" and gpus > 1:
        why = why_split(request, config, asked=is_automatic)
        if why is not None:
            say(f"{why}: it is split between {gpus} GPUs, and no ranks are started.")
            return replace(request, device_map="auto")
    return _as_rank(request, config, False)


def _as_rank(request: LoadRequest, config: MultiGPUConfig | None, is_split: bool) -> LoadRequest:
    """The request of one of several ranks, which has one GPU; or of the only one."""
    if is_split and get_world_size() > 1:
        raise ConfigError(
            got=f"device_map={request.device_map!r} was given to {get_world_size()} ranks.",
            need="A model is split between all GPUs by one process; each rank has a GPU of its own.",
            fix="Run python FILE for the split, or leave device_map out to copy the model to every GPU.",
        )
    setup_multi_gpu(config_of(config))
    if get_world_size() > 1 and _names_a_gpu(request.device_map):
        raise ConfigError(
            got=f"device_map={request.device_map!r} was given to {get_world_size()} ranks.",
            need="Each rank has a GPU of its own, and this would put all of them on one.",
            fix="Leave device_map out; CUDA_VISIBLE_DEVICES says which GPUs are used.",
        )
    settings, is_alone = config or settings_of_run(), group_size() == 1
    if is_alone and settings.way == "deepspeed":  # it trains without, unless something else started it
        settings = MultiGPUConfig()
    if settings.way == "tensor" and request.flags.full_finetuning:
        raise refusal(
            "tensor", "full_finetuning", "full_finetuning=True and tensor_parallel were given together."
        )
    request = _for_deepspeed(replace(request, is_alone=is_alone), settings)
    request = replace(request, tensor_group=tensor_group(settings))
    return _sharing(request, settings)


def _sharing(request: LoadRequest, config: MultiGPUConfig) -> LoadRequest:
    """The request of a rank whose weights are shared out, if they are: all that is trained, what is frozen by need."""
    full, eight_bit = request.flags.full_finetuning, request.flags.load_in_8bit
    is_open = config.way == "auto" and request.zero_stage is None
    if group_size() == 1 or not (is_open or config.way == "fsdp"):
        return request
    if is_open:
        layout = layout_of_ranks(request)
        is_needed = layout is not None and layout.is_sharded
        size = layout.shard if layout is not None and layout.shard < layout.data else None
        config = MultiGPUConfig(strategy="fsdp", shard_size=size)
    elif full or config.shard_frozen is not None:
        is_needed = full or bool(config.shard_frozen)
    else:
        is_needed = not copies_fit(request)
    if not is_needed:
        return request
    if eight_bit:
        raise refusal("fsdp", "8-bit", "load_in_8bit=True was given with strategy='fsdp'.")
    if request.keep_dequantized:
        raise refusal(
            "fsdp", "keep_dequantized", "keep_dequantized=True was given for weights that ranks share out."
        )
    from pantheraml.distributed.strategies.fsdp import sharding_of

    return replace(request, sharding=sharding_of(config, trained=full))


def _as_pipeline(request: LoadRequest, config: MultiGPUConfig) -> LoadRequest:
    """The request of a process that is a whole pipeline, be it one of several ranks or the only one."""
    if request.num_labels is not None:
        raise refusal(
            "pipeline", "num_labels", f"A pipeline and num_labels={request.num_labels} were asked for."
        )
    setup_multi_gpu(config)
    devices = rank_devices()
    on_cpu = devices[0].type == "cpu"
    if request.device_map not in (None, "auto", "balanced", *(["cpu"] if on_cpu else [])):
        raise ConfigError(
            got=f"device_map={request.device_map!r} and a pipeline of {len(devices)} stages were asked for.",
            need="The planner puts the stages of each rank on its GPUs.",
            fix="Leave device_map out, or leave pipeline_parallel out for a split of your own in one process.",
        )
    is_alone = group_size() == 1
    if on_cpu:
        return replace(request, is_alone=is_alone, pipeline=PipelineDevices(devices))
    here = visible_memory()
    limits = read_limits(request.max_memory, here)
    ranks = LaunchEnvironment.detect().local_world_size
    unnamed = [gpu for gpu in list(here)[: ranks * len(devices)] if gpu not in limits]
    if unnamed:
        raise ConfigError(
            got=f"max_memory names no limit for {', '.join(f'GPU {gpu}' for gpu in unnamed)} of a pipeline.",
            need="A pipeline has a layer or more on each of its GPUs.",
            fix="Name every GPU in max_memory, or leave it out.",
        )
    # Of all ranks the least, so that all split the model alike, as their reductions ask for.
    found = gather_objects([limits[device.index] for device in devices])
    least = tuple(min(column) for column in zip(*found, strict=True))
    return replace(request, is_alone=is_alone, pipeline=PipelineDevices(devices, least))


def _for_deepspeed(request: LoadRequest, config: MultiGPUConfig) -> LoadRequest:
    """The request of a rank that DeepSpeed will train on."""
    from pantheraml.models.zero3 import zero_stage_of

    stage = zero_stage_of(config)
    if stage == 3 and request.kernels == "auto":
        say(f"fused parts: none. {REFUSED['deepspeed, zero_stage=3', 'fused kernels'].reason}")
        request = replace(request, kernels="off")
    return replace(request, zero_stage=stage)


def _names_a_gpu(device_map: object) -> bool:
    """Whether it is one GPU, ``1``, ``"cuda:1"`` or ``{"": 1}``, which all ranks would share."""
    if isinstance(device_map, Mapping):
        return any(_names_a_gpu(place) for place in cast("Mapping[str, object]", device_map).values())
    return isinstance(device_map, int) or str(device_map).startswith("cuda:")


def _one_max_memory(request: LoadRequest, config: MultiGPUConfig | None) -> object:
    """The limits, which may be given in either place."""
    given, of_config = request.max_memory, None if config is None else config.max_memory
    if given is not None and of_config is not None and dict(given) != dict(of_config):
        raise ConfigError(
            got="max_memory was given to from_pretrained and, differently, in MultiGPUConfig.",
            need="Each GPU has one limit.",
            fix="Keep one of them.",
        )
    return of_config if given is None else given
