"""What started this process, which rank it is, and whether it may start ranks. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pantheraml.errors import ConfigError
from pantheraml.launch.gpus import num_visible_gpus
from pantheraml.launch.process import Process
from pantheraml.launch.slurm import Step, bare_job, layout, read_step
from pantheraml.launch.variables import missing, whole_number

Kind = Literal["python", "torchrun", "accelerate", "slurm-node", "slurm-gpu", "pantheraml", "notebook"]

# What torch reads; all three or none.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# Set by every `accelerate launch`, and (unlike others of its variables) by nothing else.
_ACCELERATE = ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_CONFIG_DS_FIELDS")
# Set by our own agent for its ranks, to the folder they share on their machine.
AGENT = "PANTHERAML_AGENT"
# Set by torch elastic's agent for its ranks, whoever calls it.
_ELASTIC = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class LaunchEnvironment:
    """Who started this process and where it stands among the ranks of its run.

    A process that is no rank (yet) is rank 0 of 1.

    Attributes:
        kind: what started it. ``"python"``: nothing special. ``"torchrun"``: torchrun, or whatever else sets torch's
            variables. ``"accelerate"``: ``accelerate launch``. ``"slurm-node"``: srun, as the only task of its node,
            whose ranks it is to start. ``"slurm-gpu"``: srun, as one of a node's tasks, each of which is a rank.
            ``"pantheraml"``: our agent, as one of its ranks. ``"notebook"``: a person; a notebook, a prompt, a pipe.
        rank: its number among all ranks.
        local_rank: its number among the ranks of its machine.
        world_size: all ranks.
        local_world_size: ranks on its machine.
        node_rank: number of its machine.
        num_nodes: machines.
        master_addr: host where the ranks meet, or are to meet.
        master_port: port where they do.
        why_not_rerun: why the program cannot be started again as ranks, as a clause; None if it can, and for ranks.
        note: what the user should know of how the program was started, as sentences; mostly empty.
    """

    kind: Kind
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    why_not_rerun: str | None = None
    note: str = ""

    @property
    def is_rank(self) -> bool:
        """Whether someone started this process as a rank, so that there is nothing left to start."""
        return self.kind in ("torchrun", "accelerate", "slurm-gpu", "pantheraml")

    @classmethod
    def detect(
        cls,
        variables: Mapping[str, str] | None = None,
        process: Process | None = None,
        gpus: Callable[[], int | None] | None = None,
    ) -> LaunchEnvironment:
        """Read it from the environment; changes nothing.

        Args:
            variables: the environment; None is that of this process.
            process: facts about the process; None reads those of this one.
            gpus: counts visible GPUs; called only where SLURM started several tasks on a node without counting GPUs.

        Raises:
            ConfigError: the variables are incomplete, contradict each other, or ask for what cannot be.
        """
        variables = os.environ if variables is None else variables
        if _says_rank(variables):
            return _torch_rank(variables)
        if any(name in variables for name in _ACCELERATE):
            return cls("accelerate")  # for one process it sets no rank
        process = process or Process.read()
        step = read_step(variables)
        if step is not None:
            return _slurm_task(variables, step, process, gpus or (lambda: num_visible_gpus(variables)))
        kind = "notebook" if process.is_notebook else "python"
        return cls(kind, why_not_rerun=process.why_not_rerun, note=bare_job(variables))


def _says_rank(variables: Mapping[str, str]) -> bool:
    # Batch scripts export WORLD_SIZE for programs that take the rest from SLURM, as we do.
    names = ("RANK", "LOCAL_RANK") if variables.get("SLURM_STEP_ID") else _RANK_VARIABLES
    return len(missing(variables, names)) < len(names)


def _torch_rank(variables: Mapping[str, str]) -> LaunchEnvironment:
    lacking = missing(variables, _RANK_VARIABLES)
    if not lacking and variables["WORLD_SIZE"].strip() != "1":
        lacking = missing(variables, ("MASTER_ADDR", "MASTER_PORT"))
    if lacking:
        there = [name for name in _RANK_VARIABLES if name not in missing(variables, _RANK_VARIABLES)]
        raise ConfigError(
            got=f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} set, {' and '.join(lacking)} "
            f"{'is' if len(lacking) == 1 else 'are'} not.",
            need="A rank needs all of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.",
            fix=f"Start the script by torchrun, which sets them, or type unset {' '.join(_RANK_VARIABLES)} for one "
            "process.",
        )
    numbers = {name: whole_number(variables, name) for name in _RANK_VARIABLES}
    rank, local_rank, world_size = numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"]
    kind = _rank_kind(variables)
    # A task that is a rank writes torch's variables, or its batch script did; torchrun in a task has an agent.
    step = read_step(variables) if kind == "torchrun" and _ELASTIC not in variables else None
    if step is not None and (rank, world_size) == (step.rank, sum(step.tasks)):
        kind = "slurm-gpu"
        local_world_size, node_rank, num_nodes = step.tasks[step.node_rank], step.node_rank, len(step.hosts)
    else:
        local_world_size = _optional(variables, "LOCAL_WORLD_SIZE", world_size)
        num_nodes = _optional(variables, "GROUP_WORLD_SIZE", max(1, world_size // max(1, local_world_size)))
        node_rank = _optional(variables, "GROUP_RANK", rank // max(1, local_world_size))
    found = LaunchEnvironment(
        kind=kind,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=node_rank,
        num_nodes=num_nodes,
        master_addr=variables.get("MASTER_ADDR") or None,
        master_port=_port(variables),
    )
    _check_places(found)
    return found


def _rank_kind(variables: Mapping[str, str]) -> Kind:
    if variables.get(AGENT):
        return "pantheraml"
    return "accelerate" if any(name in variables for name in _ACCELERATE) else "torchrun"


def _check_places(found: LaunchEnvironment) -> None:
    for what, number, count in (
        ("RANK", found.rank, found.world_size),
        ("LOCAL_RANK", found.local_rank, found.local_world_size),
        ("the number of this machine", found.node_rank, found.num_nodes),
    ):
        if number >= count:
            raise ConfigError(
                got=f"{what[0].upper()}{what[1:]} is {number} of {count}.",
                need=f"Ranks and machines are counted from 0, so it is at most {max(0, count - 1)}.",
                fix=f"Start the script by torchrun, or type unset {' '.join(_RANK_VARIABLES)} for one process.",
            )
    if found.kind == "pantheraml" and found.local_world_size * found.num_nodes != found.world_size:
        raise ConfigError(
            got=f"This machine runs {found.local_world_size} of the {found.world_size} ranks of {found.num_nodes} "
            "machines: the machines have different numbers of GPUs.",
            need="Every machine of a run has the same number.",
            fix="Type srun --gpus-per-node=N, with N GPUs that every node has, or MultiGPUConfig(num_processes=N).",
        )


def _slurm_task(
    variables: Mapping[str, str], step: Step, process: Process, gpus: Callable[[], int | None]
) -> LaunchEnvironment:
    address, port = variables.get("MASTER_ADDR") or step.hosts[0], _port(variables) or step.port
    if len(step.hosts) > 1 and (address == "localhost" or address.startswith("127.")):
        raise ConfigError(
            got=f"MASTER_ADDR is {address!r} in a step of {len(step.hosts)} nodes.",
            need="It is an address of the first node which the others reach.",
            fix=f"Type unset MASTER_ADDR in the batch script: {step.hosts[0]} is taken then.",
        )
    if layout(step, gpus) == "slurm-node":
        return LaunchEnvironment(
            kind="notebook" if process.is_notebook else "slurm-node",
            node_rank=step.node_rank,
            num_nodes=len(step.hosts),
            master_addr=address,
            master_port=port,
            why_not_rerun=process.why_not_rerun,
        )
    return LaunchEnvironment(
        kind="slurm-gpu",
        rank=step.rank,
        local_rank=step.local_rank,
        world_size=sum(step.tasks),
        local_world_size=step.tasks[step.node_rank],
        node_rank=step.node_rank,
        num_nodes=len(step.hosts),
        master_addr=address,
        master_port=port,
    )


def _optional(variables: Mapping[str, str], name: str, default: int) -> int:
    return whole_number(variables, name) if variables.get(name, "").strip() else default


def _port(variables: Mapping[str, str]) -> int | None:
    if not variables.get("MASTER_PORT", "").strip():
        return None
    port = whole_number(variables, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise ConfigError(
            got=f"MASTER_PORT is {port}.",
            need="A port is a number from 1 to 65535.",
            fix="Type unset MASTER_PORT: a port is chosen then.",
        )
    return port
