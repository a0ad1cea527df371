"""What ``strategy="auto"`` becomes: the plan of ``devices/plan.py`` for the GPUs that are there.

    before ranks are started    whether this process splits the layers between all GPUs instead
    by the ranks together       a copy on each, or shares (FSDP2)

Ranks tell one another what each has, and decide by the least of it, each by itself and all alike. Nothing is loaded for
it: sizes follow from the model's configuration.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices.known_gpus import GpuKind, gpu_of
from pantheraml.devices.layout import Layout, Spread
from pantheraml.devices.memory_limits import read_limits
from pantheraml.devices.plan import PlanChoice, PlanRequest, best_plan, choose_plan
from pantheraml.devices.plan_advice import NothingFits
from pantheraml.devices.plan_words import describe_choice, title_of
from pantheraml.devices.visible_gpus import visible_memory
from pantheraml.distributed.process_group import gather_objects, rank_device
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.log import say_once, warn

if TYPE_CHECKING:
    from pantheraml.models.assembly import LoadRequest

# A checkpoint of less than this share of a GPU fits there without a closer look, trained by an adapter.
_SURELY = 0.4
_COPIES: tuple[Spread, ...] = ("none", "ddp")


class _Told(NamedTuple):
    """What a rank has: the name of its GPU, how many bytes of it may be taken, and how many ranks its host has."""

    name: str
    memory: int
    host: int


def why_split(request: LoadRequest, config: MultiGPUConfig, *, asked: bool) -> str | None:
    """Why this process splits the layers between all GPUs, as a clause; None: ranks are started.

    Args:
        request: what is to be loaded.
        config: of the run.
        asked: whether ``device_map="auto"`` was, by which a model that no GPU holds is split.
    """
    limits = read_limits(request.max_memory, visible_memory())
    if not limits or _is_surely_small(request, min(limits.values())):
        return None
    ranks = config.num_processes or len(limits)
    planned = _request_for(request, (gpu_of("GPU", min(limits.values())),) * ranks)
    if planned is None:
        return None
    may_share = not asked and "fsdp" in planned.allowed
    if _fits(replace(planned, allowed=(*_COPIES, "fsdp") if may_share else _COPIES)):
        return None
    if asked:
        return 'the model does not fit on each GPU, and device_map="auto" was asked for'
    if not config.auto_device_map:
        return None
    if not may_share:
        return "the model does not fit on each GPU, and ranks do not share out 8-bit weights"
    if best_plan(planned, Layout("pipeline", pipeline=len(limits))) is None:
        return None
    return "neither the model nor a share of its weights fits on each GPU, and its layers between them do"


def layout_of_ranks(request: LoadRequest) -> Layout | None:
    """What all ranks do with the weights; rank 0 says why. Every rank has to ask.

    Returns:
        A layout of ``"ddp"`` or ``"fsdp"``; None where nobody knows what would fit: without GPUs, and for architectures
        that no family describes.
    """
    planned = _request_of_ranks(request)
    if planned is None:
        return None
    try:
        choice = choose_plan(planned)
    except NothingFits as error:
        warn(f"by the plan nothing fits. {error}")
        return _least(planned)
    if choice.plan.layout.strategy not in (*_COPIES, "fsdp"):
        degree = f"{choice.plan.layout.strategy}_parallel"
        size = max(choice.plan.layout.tensor, choice.plan.layout.pipeline)
        warn(
            f"by the plan neither copies nor shares of the weights fit: {choice.reason}. "
            f"Write MultiGPUConfig({degree}={size}) for that."
        )
        return _least(planned)
    _say(request, planned, choice)
    return choice.plan.layout


def copies_fit(request: LoadRequest) -> bool:
    """Whether every rank can train the whole model; True if unknown. Every rank has to ask."""
    planned = _request_of_ranks(request)
    return planned is None or _fits(replace(planned, allowed=_COPIES))


def _request_of_ranks(request: LoadRequest) -> PlanRequest | None:
    gathered = gather_objects(_mine(request))
    told = [one for one in gathered if one is not None]
    if len(told) < len(gathered):  # of the host, nobody knows what ranks may take
        return None
    hosts = {one.host for one in told}
    # Whether the GPUs multiply FP8 is asked when weights are loaded.
    gpus = tuple(replace(gpu_of(one.name, one.memory), has_fp8=True) for one in told)
    planned = _request_for(request, gpus)
    if planned is None:
        say_once(
            "no plan: no family describes this architecture, so nobody knows what fits, and every rank has a copy. "
            'MultiGPUConfig(strategy="fsdp") shares the weights out.'
        )
        return None
    return replace(planned, host=hosts.pop() if len(hosts) == 1 else len(gpus))


def _mine(request: LoadRequest) -> _Told | None:
    """What this rank has; None without a GPU."""
    device, here = rank_device(), visible_memory()
    if device.type != "cuda" or device.index not in here:
        return None
    import torch

    limits = read_limits(request.max_memory, here)
    memory = limits.get(device.index, here[device.index])
    return _Told(torch.cuda.get_device_name(device), memory, LaunchEnvironment.detect().local_world_size)


def _request_for(request: LoadRequest, gpus: tuple[GpuKind, ...]) -> PlanRequest | None:
    """What is to be planned; None for an architecture that no family describes."""
    from pantheraml.models.assembly import before_loading

    model = before_loading(request)
    parts = model.parts()
    if parts is None:
        return None
    eight_bit = request.flags.load_in_8bit
    return PlanRequest(
        parts,
        gpus,
        model.tokens,
        recompute="auto" if request.recompute == "auto" else request.recompute is not False,
        allowed=(*_COPIES, "pipeline") if eight_bit else (*_COPIES, "fsdp", "tensor", "pipeline"),
    )


def _fits(planned: PlanRequest) -> bool:
    try:
        choose_plan(planned)
    except NothingFits:
        return False
    return True


def _least(planned: PlanRequest) -> Layout:
    """What takes the least of each GPU among what ranks can do."""
    count = len(planned.gpus)
    if "fsdp" not in planned.allowed:
        return Layout("ddp", data=count)
    return Layout("fsdp", data=count, shard=count, shard_frozen=True)


def _say(request: LoadRequest, planned: PlanRequest, choice: PlanChoice) -> None:
    lines = describe_choice(planned, choice)
    shown = {name: lines[name] for name in ("plan", "why", "runner-up") if name in lines}
    width = max(map(len, shown))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in shown.items())
    say_once(f"{title_of(request.model_name, planned)}\n{table}")


def _is_surely_small(request: LoadRequest, limit: int) -> bool:
    """Whether a copy fits without a closer look, which takes seconds in a process that is to start ranks alone."""
    folder = Path(request.model_name)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    is_plain = not request.flags.full_finetuning and request.max_memory is None
    is_base = size > 0 and not (folder / "adapter_config.json").exists()
    return is_plain and is_base and size < _SURELY * limit
