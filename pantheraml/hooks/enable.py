"""``enable_multi_gpu``: a script that was written for one GPU trains on all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from pantheraml.config.multi_gpu import Backend, MultiGPUConfig
from pantheraml.devices.inventory import num_gpus as visible_gpus
from pantheraml.distributed.process_group import (
    get_local_rank,
    get_rank,
    group_size,
    rank_device,
    set_settings_of_run,
    settings_of_run,
    setup_multi_gpu,
)
from pantheraml.errors import ConfigError
from pantheraml.hooks.settings import HookSettings
from pantheraml.launch.environment import LaunchEnvironment


@dataclass(frozen=True)
class _Enabled:
    """What is on, and what there was before."""

    settings: HookSettings
    adoption: Any
    settings_before: MultiGPUConfig
    debug_before: dist.DebugLevel


_enabled: _Enabled | None = None


def enable_multi_gpu(
    num_gpus: int | None = None,
    batch_size_per_gpu: int | None = None,
    ddp_backend: Backend = "nccl",
    enable_memory_optimization: bool = True,
    enable_gradient_checkpointing: bool | Literal["auto"] | None = None,
    find_unused_parameters: bool = False,
    debug: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Let a script's ``trl.SFTTrainer`` train on every GPU; see ``docs/existing-scripts.md``.

    Started by plain ``python``, this process starts a rank for each GPU, which run the script from its beginning, and
    does not come back from here; ranks of torchrun, accelerate launch and srun are joined. A second call with the same
    arguments does nothing.

    Args:
        num_gpus: of this machine; None is all that are visible. Without GPUs, so many ranks run on the CPU.
        batch_size_per_gpu: in the place of ``per_device_train_batch_size``; None leaves it to the script.
        ddp_backend: how ranks talk, as in ``MultiGPUConfig.backend``.
        enable_memory_optimization: repeat a step that runs out of memory in smaller passes, with the same gradient, on
            all ranks; False lets it end the run.
        enable_gradient_checkpointing: recompute activations, or not, whatever the script says; ``"auto"``: as few
            layers as memory asks for in models of ``FastLanguageModel``, all of others; None leaves it to the script.
        find_unused_parameters: as in ``MultiGPUConfig``.
        debug: at every logging step ranks compare what they train, and end if it differs; torch names trained weights
            that took no part in a backward where it misses them.
        more: other fields of ``MultiGPUConfig``: ``strategy``, ``timeout_minutes``, ``hang_seconds``, ...

    Returns:
        ``get_multi_gpu_status()``.

    Raises:
        ConfigError: unknown or contradicting arguments, other ones than before, or a process that cannot start ranks.
    """
    global _enabled  # noqa: PLW0603
    settings = HookSettings(
        num_gpus, batch_size_per_gpu, ddp_backend, enable_memory_optimization, enable_gradient_checkpointing,
        find_unused_parameters, debug, more,
    )  # fmt: skip
    if _enabled is not None:
        _check_same(_enabled.settings, settings)
        return get_multi_gpu_status()
    _check_group(settings)
    before, debug_before = settings_of_run(), dist.get_debug_level()
    if debug:
        # torch then names the weights that took no part in a backward; at DETAIL, 2.13 crashes with gloo.
        dist.set_debug_level(dist.DebugLevel.INFO)
    set_settings_of_run(settings.multi_gpu)
    try:
        setup_multi_gpu(settings.multi_gpu)
        from pantheraml.hooks.adoption import Adoption  # imports trl, which only ranks need

        adoption = Adoption(settings)
        adoption.begin()
    except BaseException:
        set_settings_of_run(before)
        dist.set_debug_level(debug_before)
        raise
    _enabled = _Enabled(settings, adoption, before, debug_before)
    return get_multi_gpu_status()


def disable_multi_gpu() -> None:
    """Undo ``enable_multi_gpu``: trainers that are built from now on are TRL's own; nothing where it is not enabled.

    Ranks stay ranks, and their process group stays, until the script ends or ``cleanup_multi_gpu()`` is called.

    Raises:
        ConfigError: another library has changed the same constructor since; nothing is undone then.
    """
    global _enabled  # noqa: PLW0603
    if _enabled is None:
        return
    _enabled.adoption.end()
    set_settings_of_run(_enabled.settings_before)
    dist.set_debug_level(_enabled.debug_before)
    _enabled = None


def is_multi_gpu_enabled() -> bool:
    """Whether ``enable_multi_gpu`` is in force in this process."""
    return _enabled is not None


def get_active_config() -> dict[str, Any] | None:
    """The arguments in force, as ``enable_multi_gpu(**arguments)`` takes them; None where it is not enabled."""
    return None if _enabled is None else _enabled.settings.arguments


def get_multi_gpu_status() -> dict[str, Any]:
    """What is so at this moment, enabled or not.

    Returns:
        ``enabled``; ``world_size``: ranks that talk to one another; ``rank``, ``local_rank``; ``started_by``: as
        ``LaunchEnvironment.kind``; ``backend``: of the process group, None without one; ``device``: of this rank;
        ``visible_gpus``: of this process; ``trainers``: classes of the trainers that became ours, in order;
        ``changed``: what is changed of other libraries; ``config``: as ``get_active_config()``.
    """
    is_group = dist.is_available() and dist.is_initialized()
    return {
        "enabled": _enabled is not None,
        "world_size": group_size(),
        "rank": get_rank(),
        "local_rank": get_local_rank(),
        "started_by": LaunchEnvironment.detect().kind,
        "backend": dist.get_backend_config() if is_group else None,
        "device": str(rank_device()),
        "visible_gpus": visible_gpus(),
        "trainers": [] if _enabled is None else list(_enabled.adoption.trainers),
        "changed": [] if _enabled is None else _enabled.adoption.changes(),
        "config": get_active_config(),
    }


def _check_same(now: HookSettings, asked: HookSettings) -> None:
    old, new = now.arguments, asked.arguments
    if old == new:
        return
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    raise ConfigError(
        got=f"enable_multi_gpu was called again, with another {', '.join(names)}.",
        need="One set of arguments is in force.",
        fix="Call disable_multi_gpu() first, or leave the second call out.",
    )


def _check_group(settings: HookSettings) -> None:
    """Refuse a backend that ranks which talk already do not have."""
    if not dist.is_initialized():
        return
    backend = "gloo" if settings.ddp_backend == "nccl" and visible_gpus() == 0 else settings.ddp_backend
    there = dist.get_backend_config()
    if backend not in there:
        raise ConfigError(
            got=f"enable_multi_gpu(ddp_backend={settings.ddp_backend!r}) was called by ranks that use {there}.",
            need="A process group keeps the backend that it was made with.",
            fix="Call enable_multi_gpu before what makes the group: arguments of transformers, or an Accelerator.",
        )
