"""The process group of a run: made once, whoever started the ranks, and destroyed at the end.

Every function here is right without a group too: one process is rank 0 of 1.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.rank_gpus import gpus_of_each, gpus_of_rank
from pantheraml.launch.start import ensure_ranks
from pantheraml.log import say_once

T = TypeVar("T")
# A wait in the store that only the end of the run ends.
_LONG = timedelta(days=7)
# Seconds in which threads that a process group leaves behind are done with their last work.
_COMING_TO_REST = 0.2
# Seconds for a rank that failed to say why, before those that waited for it say that it did.
_CAUSE_FIRST = 5.0
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def setup_multi_gpu(config: MultiGPUConfig | None = None) -> MultiGPUConfig:
    """Make this process one of the ranks of a run, and let the ranks talk to one another.

    Started by plain ``python``, the process starts one rank for each GPU, which run the script from its beginning, and
    does not come back from here. A second call does nothing.

    Args:
        config: settings; None takes the defaults.

    Returns:
        The settings.

    Raises:
        ConfigError: the script cannot be started again, or its surroundings contradict the settings.
    """
    config = config_of(config)
    if config != MultiGPUConfig():
        set_settings_of_run(config)
    environment = ensure_ranks(config)
    if environment.world_size > 1 and not dist.is_initialized():
        _create(config, environment)
    elif environment.world_size > 1 and not _is_made_so(config):
        say_once("the ranks talk already, through a process group with a backend and a timeout of its own.")
    return config


def join_early() -> None:
    """Let ranks that others started talk to one another before there are settings, as the defaults say.

    Training arguments need a process group; without ours they make one that cannot talk between hosts' memories.
    """
    environment = LaunchEnvironment.detect()
    if os.environ.get("LOCAL_RANK") and environment.world_size > 1 and not dist.is_initialized():
        # It is not known yet whether ranks have several GPUs.
        _create(_settings, ensure_ranks(_settings), is_bound=False)


def settings_of_run() -> MultiGPUConfig:
    """The settings that ``setup_multi_gpu`` was given last, for a trainer that gets none of its own."""
    return _settings


def set_settings_of_run(config: MultiGPUConfig) -> None:
    """Let ``config`` be the settings for trainers that get none of their own."""
    global _settings  # noqa: PLW0603
    _settings = config


def cleanup_multi_gpu() -> None:
    """End a run: destroy the process group, if there is one, and forget the settings."""
    global _settings  # noqa: PLW0603
    _settings = MultiGPUConfig()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def distributed_context(config: MultiGPUConfig | None = None) -> Iterator[MultiGPUConfig]:
    """``setup_multi_gpu`` for a block; the process group that it made is destroyed at its end, also by an exception."""
    existed = dist.is_initialized()
    try:
        yield setup_multi_gpu(config)
    finally:
        if not existed:
            cleanup_multi_gpu()


def rank_device() -> torch.device:
    """The device of this rank: the GPU of its number on this machine, or the only one it sees; the CPU without one.

    Of a rank that has several, the first.
    """
    return rank_devices()[0]


def rank_devices() -> tuple[torch.device, ...]:
    """The devices of this rank, in the order of a pipeline's stages: several GPUs, or the CPU once for each stage."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return (torch.device("cpu"),) * gpus_of_each(_settings, 0)
    return tuple(torch.device("cuda", gpu) for gpu in gpus_of_rank(_settings, get_local_rank(), count))


def is_distributed_available() -> bool:
    """Whether this process is a member of a process group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of ranks: of the process group, or of what started this process; 1 otherwise."""
    return dist.get_world_size() if is_distributed_available() else LaunchEnvironment.detect().world_size


def group_size() -> int:
    """Number of ranks that talk to one another: 1 without a process group, whoever started this process."""
    return dist.get_world_size() if is_distributed_available() else 1


def is_first_of_group() -> bool:
    """Whether this process is rank 0 of its process group, or in none: one that trains by itself saves by itself."""
    return not is_distributed_available() or dist.get_rank() == 0


def get_rank() -> int:
    """Number of this rank among all, from 0."""
    return dist.get_rank() if is_distributed_available() else LaunchEnvironment.detect().rank


def get_local_rank() -> int:
    """Number of this rank among those of its machine, from 0."""
    return LaunchEnvironment.detect().local_rank


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed_available():
        all_reduce_scalar(0.0)


def broadcast_object(value: T, source: int = 0) -> T:
    """What rank ``source`` passed, on every rank; any object that can be pickled."""
    if not is_distributed_available():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source, device=_device())
    return box[0]


def gather_objects(value: T) -> list[T]:
    """What each rank passed, by rank, on every rank."""
    if not is_distributed_available():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def gather_numbers(values: Sequence[float]) -> list[list[float]]:
    """``values`` of each rank, by rank, in float64, on every rank; all pass as many. Sooner done than objects are."""
    if not is_distributed_available():
        return [list(values)]
    found = torch.zeros(dist.get_world_size(), len(values), dtype=torch.float64)
    found[dist.get_rank()] = torch.tensor(values, dtype=torch.float64)
    found = found.to(_device())
    dist.all_reduce(found)
    return found.tolist()


def all_reduce_scalar(value: float, op: Literal["sum", "mean", "max", "min"] = "sum") -> float:
    """``value`` of all ranks, summed in float64 (or their mean, largest or smallest); the same on every rank.

    Raises:
        ConfigError: another ``op``.
    """
    if op != "mean" and op not in _REDUCTIONS:
        raise ConfigError(
            got=f"all_reduce_scalar(op={op!r}) was called.",
            need=f"It is one of {', '.join(map(repr, ('mean', *_REDUCTIONS)))}.",
            fix="Leave it out for the sum.",
        )
    if not is_distributed_available():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(total, _REDUCTIONS.get(op, dist.ReduceOp.SUM))
    return total.item() / (dist.get_world_size() if op == "mean" else 1)


def _is_made_so(config: MultiGPUConfig) -> bool:
    """Whether we made the process group, with what ``config`` says of it beside the defaults."""
    return _made_with is not None and all(
        getattr(config, name) in (getattr(MultiGPUConfig, name), getattr(_made_with, name))
        for name in ("backend", "timeout_minutes")
    )


def _create(config: MultiGPUConfig, environment: LaunchEnvironment, *, is_bound: bool = True) -> None:
    device, has_several = rank_device(), len(rank_devices()) > 1
    backend: str = config.backend
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if has_several:  # else accelerate takes the GPU of the rank's number, which is another rank's
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # small things are said between CPUs, without waiting for a GPU
    elif backend == "nccl":
        say_once("there is no GPU, so the ranks talk through gloo.")
        backend = "gloo"
    if backend == "mpi" and not dist.is_mpi_available():
        raise ConfigError(
            got="MultiGPUConfig(backend='mpi') was given.",
            need="This torch was built without MPI.",
            fix="Leave backend out for NCCL between GPUs, or write backend='gloo'.",
        )
    global _made_with  # noqa: PLW0603
    _made_with = config
    timeout = timedelta(minutes=config.timeout_minutes)
    store, _, _ = next(dist.rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
    dist.init_process_group(
        backend,
        # An agent's store outlives the group and remembers where the ranks of the last one listened.
        store=PrefixStore(f"{_start()}/group_{next(_groups)}", store),
        timeout=timeout,
        rank=environment.rank,
        world_size=environment.world_size,
        # A group that is bound to one GPU reduces nothing on a rank's others.
        device_id=device if device.type == "cuda" and is_bound and not has_several else None,
    )
    atexit.register(_leave)


def _leave() -> None:
    """Destroy the process group, and let its threads come to rest.

    A thread of gloo's lets go of the tensors of a collective a moment after whoever waited for it goes on, and asks for
    Python's lock to do so. Where Python has ended by then, it aborts the process, and with it the run.
    """
    cleanup_multi_gpu()
    time.sleep(_COMING_TO_REST)


def _device() -> torch.device:
    """Where small tensors are reduced: on the CPU, if the group can."""
    if "gloo" in dist.get_backend_config():
        return torch.device("cpu")
    return rank_device()


@contextmanager
def main_process_first(local: bool = True) -> Iterator[None]:
    """Rank 0 (of each machine) goes through the block before the others begin it, and all leave it together.

    They wait for keys of the run's store, so that no collective runs into its timeout, however long the block takes. If
    it fails on the first rank, the others fail too.

    Args:
        local: the first rank of each machine goes first; False: rank 0 alone.
    """
    if not is_distributed_available():
        yield
        return
    environment = LaunchEnvironment.detect()
    first = environment.local_rank == 0 if local else environment.rank == 0
    turn, store = f"first/{next(_turns)}", connect_store()
    key = f"{turn}/node {environment.node_rank if local else 0}"
    if not first:
        store.wait([key], _LONG)
        said = store.get(key).decode()
        if said:
            time.sleep(_CAUSE_FIRST)
            raise RuntimeError(f"The first rank failed where this one waited for it: {said}")
    said = ""
    try:
        yield
    except BaseException as error:
        said = repr(error)
        raise
    finally:
        if first:
            store.set(key, said)
        store.set(f"{turn}/{environment.rank}", said)
    store.wait([f"{turn}/{rank}" for rank in range(environment.world_size)], _LONG)


# Ranks take the same turns in the same order, so their keys agree.
_turns, _groups = count(), count()
_settings = MultiGPUConfig()
_made_with: MultiGPUConfig | None = None  # settings of the process group that was made here


def connect_store() -> Store:
    """A connection of its own to the store at which the ranks met, under names of ours."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(f"pantheraml/{_start()}", TCPStore(host, port, is_master=False))


def _start() -> str:
    """A name for what ranks of this start say: an agent's store outlives them, and those that are started again."""
    return f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
