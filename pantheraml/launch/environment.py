"""What started this process: a plain interpreter, a launcher of ranks, or a person who types."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pantheraml.errors import ConfigError

Kind = Literal["python", "torchrun", "accelerate", "pantheraml", "slurm-node", "slurm-gpu", "notebook"]


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process among the ranks of a run.

    Attributes:
        kind: who started it.
        rank: its number among all ranks.
        local_rank: among those of its machine.
        world_size: number of ranks.
        local_world_size: of its machine.
        node_rank: number of its machine.
        num_nodes: of machines.
        master_addr: where the ranks (or the agents of several machines) meet.
        master_port: likewise.
        why_not_rerun: why this program cannot be started again for each GPU, or None.
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

    @property
    def is_rank(self) -> bool:
        """Whether somebody started this process as one of the ranks of a run, if only of one."""
        return self.kind in ("torchrun", "accelerate", "pantheraml", "slurm-gpu")

    @staticmethod
    def detect(
        variables: Mapping[str, str] | None = None, *, why_not_rerun: str | None = None
    ) -> LaunchEnvironment:
        """The environment of this process.

        Args:
            variables: None reads those of the process.
            why_not_rerun: None asks the process.

        Raises:
            ConfigError: variables of a launcher that contradict each other.
        """
        given = os.environ if variables is None else variables
        reason = why_not_rerun or _why_not_rerun()
        if "RANK" in given or "WORLD_SIZE" in given:
            return _of_ranks(given, reason)
        return LaunchEnvironment("notebook" if _is_interactive() else "python", why_not_rerun=reason)


def _of_ranks(given: Mapping[str, str], reason: str | None) -> LaunchEnvironment:
    rank, world_size = _number(given, "RANK"), _number(given, "WORLD_SIZE")
    local_rank = _number(given, "LOCAL_RANK")
    local_world_size = _number(given, "LOCAL_WORLD_SIZE", world_size)
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ConfigError(
            got=f"RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_world_size}.",
            need="A rank is below the number of ranks.",
            fix="Start the script with torchrun, accelerate launch, srun or plain python, which set all of them.",
        )
    kind: Kind = "torchrun"
    if "PANTHERAML_AGENT" in given:
        kind = "pantheraml"
    elif any(name.startswith("ACCELERATE_") for name in given):
        kind = "accelerate"
    return LaunchEnvironment(
        kind,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=_number(given, "GROUP_RANK", rank // local_world_size),
        num_nodes=-(-world_size // local_world_size),
        master_addr=given.get("MASTER_ADDR"),
        master_port=_number(given, "MASTER_PORT", 0) or None,
        why_not_rerun=reason,
    )


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = given.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise ConfigError(
            got=f"{name} is {'not set' if value is None else repr(value)}, and other variables of a launcher are.",
            need="RANK, WORLD_SIZE and LOCAL_RANK are whole numbers that are set together.",
            fix="Start the script with torchrun or accelerate launch, or unset RANK and WORLD_SIZE.",
        )
    return int(value)


def _why_not_rerun() -> str | None:
    """Why this program is not started again, asked of the process."""
    if multiprocessing.parent_process() is not None:
        return "this is a worker process that imported the script, which has no if __name__ == '__main__': around it"
    if _is_interactive():
        return "the program is typed, and not a script"
    if "pytest" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ:
        return "a test runs"
    return None


def _is_interactive() -> bool:
    shell = sys.modules.get("IPython")
    return (
        (shell is not None and shell.get_ipython() is not None)
        or hasattr(sys, "ps1")
        or bool(sys.flags.interactive)
    )
