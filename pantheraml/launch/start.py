"""Ranks where nobody started them: what this process is, and what is missing."""

from __future__ import annotations

import sys

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.errors import ConfigError
from pantheraml.launch.agent import Ranks, become_agent
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.gpus import num_visible_gpus
from pantheraml.launch.network import socket_variables
from pantheraml.launch.ranks import join
from pantheraml.log import say, say_once


def ensure_ranks(config: MultiGPUConfig) -> LaunchEnvironment:
    """What this process is in a run with ``config``; a plain script starts its ranks here and does not come back.

    Returns:
        The environment of a rank, or of the only process of a run.

    Raises:
        ConfigError: ranks are asked for where the script cannot be started again, or other than what is there.
    """
    environment = LaunchEnvironment.detect()
    if environment.is_rank:
        _check_count(config, environment)
        join(environment)
        return environment
    if config.strategy == "none":
        return environment
    here = _num_here(config)
    if environment.kind == "slurm-node" and environment.num_nodes > 1:
        _say_if_cuda_was_touched()
        host = str(environment.master_addr)
        return become_agent(
            Ranks(
                here=here,
                nodes=environment.num_nodes,
                node_rank=environment.node_rank,
                host=host,
                port=int(environment.master_port or 0),
                run_id=f"slurm-{environment.master_port}",
                variables=tuple(socket_variables(host).items()),
            )
        )
    if here == 1:
        return environment
    if environment.why_not_rerun is not None:
        raise ConfigError(
            got=f"{here} ranks were asked for, and {environment.why_not_rerun}.",
            need="Each GPU is trained by a process of its own, which runs your script from the start.",
            fix="Run python FILE (or torchrun --nproc_per_node=N FILE), or pass MultiGPUConfig(num_processes=1).",
        )
    _say_if_cuda_was_touched()
    return become_agent(Ranks(here=here))


def say_what_is_idle() -> None:
    """One line, where a single process runs on a machine with several GPUs."""
    environment = LaunchEnvironment.detect()
    count = num_visible_gpus() or 0
    if environment.note:
        say_once(environment.note)
    if not environment.is_rank and count > 1:
        say_once(
            f"{count} GPUs are visible and one of them is used; use_multi_gpu=True trains on all of them."
        )


def _num_here(config: MultiGPUConfig) -> int:
    """Ranks of this machine."""
    gpus = num_visible_gpus()
    if gpus is None:  # not NVIDIA's: torch knows
        import torch

        gpus = torch.cuda.device_count()
    if config.num_processes is None:
        return max(1, gpus)
    if 0 < gpus < config.num_processes:
        raise ConfigError(
            got=f"MultiGPUConfig(num_processes={config.num_processes}) was given, and {gpus} GPUs are visible.",
            need="Each rank has a GPU of its own.",
            fix=f"Write num_processes={gpus}, or leave it out; CUDA_VISIBLE_DEVICES says which GPUs are visible.",
        )
    return config.num_processes


def _check_count(config: MultiGPUConfig, environment: LaunchEnvironment) -> None:
    if config.num_processes is not None and config.num_processes != environment.local_world_size:
        raise ConfigError(
            got=f"MultiGPUConfig(num_processes={config.num_processes}) was given to one of "
            f"{environment.local_world_size} ranks that {environment.kind} started on this machine.",
            need="Who starts the ranks says how many there are.",
            fix=f"Leave num_processes out, or start {config.num_processes} ranks.",
        )


def _say_if_cuda_was_touched() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        say(
            "this script used a GPU before its ranks were started, and holds some hundred MiB of it until they end; "
            "call from_pretrained or setup_multi_gpu first."
        )
