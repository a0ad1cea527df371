"""What ``from_pretrained`` makes of several GPUs: ranks with a copy each, a split model in one process, or one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.config.tensor_combinations import refusal
from pantheraml.devices.visible_gpus import visible_memory
from pantheraml.distributed.data_ranks import tensor_group
from pantheraml.distributed.process_group import (
    get_world_size,
    group_size,
    settings_of_run,
    setup_multi_gpu,
)
from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.gpus import num_visible_gpus
from pantheraml.launch.start import say_what_is_idle
from pantheraml.log import say
from pantheraml.models.placement import fits_on_each, names_several

if TYPE_CHECKING:
    from pantheraml.models.assembly import LoadRequest

# A checkpoint of less than this share of a GPU fits there without a closer look, trained by an adapter.
_SURELY = 0.4


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
    request = replace(request, max_memory=_one_max_memory(request, config))
    is_automatic = request.device_map == "auto" or (request.device_map is None and auto_device_map)
    if is_automatic:
        request = replace(request, device_map="auto")
    if use_multi_gpu is False:
        return request
    gpus = num_visible_gpus() or 0
    is_split = names_several(request.device_map, gpus)
    if is_split and config is not None and config.way == "tensor":
        raise refusal(
            "device_map", f"device_map={request.device_map!r} and tensor_parallel were given together."
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
    if config.way == "auto" and may_split and gpus > 1 and not _fits_on_each(request):
        say(
            f"the model does not fit on each of {gpus} GPUs: it is split between them, and no ranks are started."
        )
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
    config = settings_of_run() if config is None else config
    if config.way == "tensor" and request.flags.full_finetuning:
        raise refusal("full_finetuning", "full_finetuning=True and tensor_parallel were given together.")
    return replace(request, is_alone=group_size() == 1, tensor_group=tensor_group(config))


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


def _fits_on_each(request: LoadRequest) -> bool:
    """Whether each GPU can train the whole model; small checkpoints are not looked at more closely, which takes
    seconds.
    """
    folder = Path(request.model_name)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    is_plain = not request.flags.full_finetuning and request.max_memory is None
    is_base = size > 0 and not (folder / "adapter_config.json").exists()
    if is_plain and is_base and size < _SURELY * min(visible_memory().values()):
        return True
    from pantheraml.models.assembly import before_loading

    return fits_on_each(before_loading(request), request.max_memory)
