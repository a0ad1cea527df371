"""Ranks where nobody started them: what this process is, and what is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.errors import ConfigError
from pantheraml.launch.agent import Ranks, become_agent
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.gpus import num_visible_gpus, read_gpus
from pantheraml.launch.network import socket_variables
from pantheraml.launch.rank_gpus import check_ranks, num_ranks, whole_ranks
from pantheraml.launch.ranks import join
from pantheraml.launch.slurm import read_step
from pantheraml.log import say, say_once


def ensure_ranks(config: MultiGPUConfig, leave: Callable[[], None] | None = None) -> LaunchEnvironment:
    """What this process is in a run with ``config``; a plain script starts its ranks here and does not come back.

    Args:
        config: of the run.
        leave: called before ranks are started: lets go of what they need and this process will not.

    Returns:
        The environment of a rank, or of the only process of a run.

    Raises:
        ConfigError: ranks are asked for where the script cannot be started again, or other than what is there.
    """
    environment = LaunchEnvironment.detect()
    if environment.is_rank:
        _check_count(config, environment)
        join(environment)
        if environment.kind != "pantheraml":
            _say_if_not_restarted(config, f"{environment.kind} did; torchrun --max-restarts=N does so again")
        return environment
    if config.strategy == "none":
        return environment
    here = _num_here(config)
    several = environment.kind == "slurm-node" and environment.num_nodes > 1
    watched = (
        config.max_restarts > 0 and environment.why_not_rerun is None
    )  # by an agent, which starts it again
    if here == 1 and not several and not watched:
        _say_note(environment)
        return environment
    if environment.why_not_rerun is not None:
        typed = environment.kind == "notebook"
        raise ConfigError(
            got=f"{here * environment.num_nodes} ranks were asked for, and {environment.why_not_rerun}.",
            need="Each GPU is trained by a process of its own, which runs your script from the start"
            + (", or a function of yours." if typed else "."),
            fix=(
                "Put the training into a function fn and write notebook_launch(fn), or run"
                if typed
                else "Run"
            )
            + " python FILE (or torchrun --nproc_per_node=N FILE), or pass MultiGPUConfig(num_processes=1).",
        )
    _say_note(environment)
    if leave is not None:
        leave()
    _say_if_cuda_was_touched()
    if several:
        _say_if_not_restarted(
            config, "SLURM started this script on several nodes; sbatch --requeue does so again"
        )
        return become_agent(_of_node(environment, here))
    return become_agent(Ranks(here, max_restarts=config.max_restarts, count=_counter(config)))


def ranks_of_a_function(config: MultiGPUConfig) -> Ranks:
    """The ranks that a function is sent to, all on this machine.

    Raises:
        ConfigError: this process is a rank itself, or one of several that would each start ranks.
    """
    environment = LaunchEnvironment.detect()
    if environment.is_rank:
        raise ConfigError(
            got=f"notebook_launch was called by rank {environment.rank} of {environment.world_size}.",
            need="It starts ranks, and the function that they run is one of them already.",
            fix="Call it from the notebook itself; setup_multi_gpu() is what a rank calls.",
        )
    if environment.num_nodes > 1:
        raise ConfigError(
            got=f"notebook_launch was called on {environment.num_nodes} nodes of SLURM.",
            need="It starts the ranks of one machine, and each node would train by itself.",
            fix="Put the training into a script and type srun --ntasks-per-node=1 python FILE.",
        )
    _say_note(environment)
    _say_if_cuda_was_touched()
    here = 1 if config.strategy == "none" else _num_here(config)
    return Ranks(here, runs="function", max_restarts=config.max_restarts)


def _of_node(environment: LaunchEnvironment, here: int) -> Ranks:
    """The ranks of one of a SLURM step's nodes, which meet at its first."""
    step, port = read_step(os.environ), int(environment.master_port or 0)
    host = str(environment.master_addr)
    hosts = (host,) if step is None else (host, *step.hosts)
    return Ranks(
        here=here,
        nodes=environment.num_nodes,
        node_rank=environment.node_rank,
        host=host,
        port=port,
        run_id=f"slurm-{port}",
        variables=tuple(socket_variables(hosts).items()),
    )


def _say_note(environment: LaunchEnvironment) -> None:
    if environment.note:
        say_once(environment.note)


def say_what_is_idle() -> None:
    """One line, where a single process runs on a machine with several GPUs."""
    environment = LaunchEnvironment.detect()
    count = num_visible_gpus() or 0
    _say_note(environment)
    if not environment.is_rank and count > 1:
        say_once(
            f"{count} GPUs are visible and one of them is used; use_multi_gpu=True trains on all of them."
        )


def _num_here(config: MultiGPUConfig) -> int:
    """Ranks of this machine."""
    return num_ranks(config, _num_gpus())


def _num_gpus() -> int:
    """GPUs that this process sees."""
    gpus = num_visible_gpus()
    if gpus is None:  # not NVIDIA's: torch knows
        import torch

        gpus = torch.cuda.device_count()
    return gpus


def _counter(config: MultiGPUConfig) -> Callable[[], int] | None:
    """Says how many ranks to start when they are started again, since a GPU may be gone; None: as many as before."""
    if config.num_processes is not None:
        return None

    def count() -> int:
        read_gpus.cache_clear()
        return whole_ranks(config, _num_gpus())

    return count


def _say_if_not_restarted(config: MultiGPUConfig, who: str) -> None:
    if config.max_restarts:
        say_once(f"max_restarts={config.max_restarts} is not for ranks that others started: {who}.")


def _check_count(config: MultiGPUConfig, environment: LaunchEnvironment) -> None:
    if config.strategy == "none" and environment.world_size > 1:
        raise ConfigError(
            got=f"MultiGPUConfig(strategy='none') was given to one of {environment.world_size} ranks that "
            f"{environment.kind} started.",
            need="Without a strategy one process trains.",
            fix="Run python FILE for one process, or leave strategy out.",
        )
    if config.num_processes is not None and config.num_processes != environment.local_world_size:
        raise ConfigError(
            got=f"MultiGPUConfig(num_processes={config.num_processes}) was given to one of "
            f"{environment.local_world_size} ranks that {environment.kind} started on this machine.",
            need="Who starts the ranks says how many there are.",
            fix=f"Leave num_processes out, or start {config.num_processes} ranks.",
        )
    if config.way == "pipeline":
        check_ranks(config, environment, _num_gpus())


def _say_if_cuda_was_touched() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        say(
            "this process used a GPU before its ranks were started, and holds some hundred MiB of it until they end; "
            "start them first."
        )
