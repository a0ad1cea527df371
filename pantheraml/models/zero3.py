"""Models that DeepSpeed's ZeRO-3 will shard: loaded whole, and whole again on rank 0 when they are saved.

Each rank loads the whole model; the engine then cuts every weight into shards, and leaves nothing in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pantheraml.config.combinations import STORED, refusal
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.launch.accelerate import is_deepspeed_launched


def zero_stage_of(config: MultiGPUConfig) -> int | None:
    """The stage of ZeRO that will train what is loaded now; None where DeepSpeed will not, or nobody has said so yet.

    Args:
        config: of the run; where it leaves the strategy open, ``accelerate launch``, or training arguments that were
            made before, may have said it.
    """
    if config.way != "auto":
        return config.zero_stage if config.way == "deepspeed" else None
    from transformers.integrations.deepspeed import deepspeed_config

    given = deepspeed_config()
    if given is not None:
        return given.get("zero_optimization", {}).get("stage", 0)
    return _of_launcher() if is_deepspeed_launched() else None


def launched_stage(args: Any) -> int | None:
    """The stage of ZeRO that ``args.deepspeed`` or ``accelerate launch`` say; None where they say no DeepSpeed.

    Args:
        args: training arguments, or None.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return plugin.hf_ds_config.config["zero_optimization"].get("stage", 0)
    return _of_launcher() if is_deepspeed_launched() else None


@contextmanager
def launched_alone() -> Iterator[None]:
    """A block after which arguments are DeepSpeed's only if the launcher says so; accelerate would remember others."""
    before = is_deepspeed_launched()
    try:
        yield
    finally:
        if not before:
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _of_launcher() -> int:
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        from accelerate.utils import DeepSpeedPlugin

        return DeepSpeedPlugin().zero_stage
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def check_storage(storage: str, zero_stage: int | None) -> None:
    """Refuse quantised weights under ZeRO-3.

    Args:
        storage: as in ``Precision.storage``.
        zero_stage: of the run.

    Raises:
        ConfigError: they cannot be sharded.
    """
    feature = STORED.get(storage)
    if zero_stage == 3 and feature is not None:
        raise refusal(
            "deepspeed, zero_stage=3", feature, f"{feature} weights and zero_stage=3 were given together."
        )


@contextmanager
def loaded_whole() -> Iterator[None]:
    """A block in which transformers loads as if it knew of no ZeRO-3, for which it takes no ``device_map``."""
    from transformers.integrations import deepspeed

    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if known is not None and known() is not None:
            deepspeed.set_hf_deepspeed_config(known())


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has taken the weights of ``model`` apart."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


# Parameters that are whole for the time being, by their identity.
_whole: set[int] = set()


@contextmanager
def whole_on_first(model: nn.Module, *, is_first: bool) -> Iterator[None]:
    """A block in which the first rank has the whole weights of a sharded model, in host memory; every rank enters it.

    Module by module they are gathered on the devices and copied, so that these never hold the whole model. Within the
    block it may be entered again, by any rank.

    Args:
        model: sharded or not.
        is_first: whether this is the rank that has use for them.
    """
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id") and id(p) not in _whole]
    if not sharded:
        yield
        return
    copies = _gathered(model, is_first=is_first)
    shards = [(parameter, parameter.data) for parameter in copies]
    for parameter, copy in copies.items():
        parameter.data = copy
    copies.clear()
    _whole.update(map(id, sharded))
    try:
        yield
    finally:
        _whole.difference_update(map(id, sharded))
        for parameter, shard in shards:
            parameter.data = shard


def _gathered(model: nn.Module, *, is_first: bool) -> dict[nn.Parameter, torch.Tensor]:
    """Copies of all sharded parameters in host memory; none on other ranks than the first, which take part."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    _await_fetched(model)
    copies: dict[nn.Parameter, torch.Tensor] = {}
    seen: set[int] = set()
    for module in model.modules():
        mine = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id") and id(p) not in seen]
        seen.update(map(id, mine))
        with deepspeed.zero.GatheredParameters(mine):
            if is_first:
                copies |= {parameter: parameter.detach().to("cpu", copy=True) for parameter in mine}
    return copies


def _await_fetched(model: nn.Module) -> None:
    """Let weights arrive that were fetched ahead, for a backward that an evaluation does not have: they cannot be cut
    again while they are on their way.
    """
    for module in model.modules():
        fetched = vars(module).get("ds_inflight_param_registry", {})
        for parameter in list(fetched):
            fetched.pop(parameter).wait()
