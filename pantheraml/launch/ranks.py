"""What a process does when it is a rank: torch's variables, one traceback, one progress bar."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pantheraml.launch.environment import AGENT, LaunchEnvironment
from pantheraml.launch.network import socket_variables
from pantheraml.launch.rank_files import OwnRecord, record_failure, recorded_hang
from pantheraml.launch.slurm import read_step
from pantheraml.log import set_quiet

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

# Of Linux: the signal that a process gets when the one that started it has ended.
_PR_SET_PDEATHSIG = 1

_joined = False
_record: OwnRecord | None = None


def join(environment: LaunchEnvironment) -> None:
    """Be the rank that ``environment`` describes; more than once is the same as once.

    SLURM's tasks get the variables that torch and accelerate read. Ranks of our agent print the traceback of the first
    of them that fails, and no other. Ranks beside the main one are quiet.
    """
    global _joined  # noqa: PLW0603
    if _joined or not environment.is_rank:
        return
    _joined = True
    if environment.kind == "slurm-gpu":
        os.environ.update(
            RANK=str(environment.rank),
            WORLD_SIZE=str(environment.world_size),
            LOCAL_RANK=str(environment.local_rank),
            LOCAL_WORLD_SIZE=str(environment.local_world_size),
            MASTER_ADDR=str(environment.master_addr),
            MASTER_PORT=str(environment.master_port),
        )
        step = read_step(os.environ)
        if environment.num_nodes > 1 and step is not None:
            os.environ.update(socket_variables((str(environment.master_addr), *step.hosts)))
    if AGENT in os.environ:
        _join_agent(environment, Path(os.environ[AGENT]))
    if environment.rank > 0:
        set_quiet(True)
        _hide_progress()


def own_record() -> OwnRecord | None:
    """What this process tells its agent of how far it is; None without an agent of ours."""
    return _record


def _join_agent(environment: LaunchEnvironment, folder: Path) -> None:
    global _record  # noqa: PLW0603
    _record = OwnRecord(folder, environment.rank)
    atexit.register(_leave_in_peace)
    sys.excepthook = FirstTraceback(environment, folder, sys.excepthook)
    if sys.platform == "linux":  # where an agent is killed, its ranks do not stay behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class FirstTraceback:
    """An excepthook that shows the first failure among the ranks of a machine, and keeps the others in files.

    Args:
        environment: of this rank.
        folder: shared by the ranks of the machine.
        show: the excepthook that was there.
    """

    def __init__(self, environment: LaunchEnvironment, folder: Path, show: Hook) -> None:
        self._environment, self._folder, self._show = environment, folder, show

    def __call__(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        """Show it, if no other rank was faster."""
        if issubclass(kind, KeyboardInterrupt):  # the agent says so, once
            return
        if recorded_hang(self._folder) is not None:  # ranks that are ended lose one another
            return
        environment = self._environment
        if record_failure(environment, self._folder, value.with_traceback(trace)):
            where = f"rank {environment.rank} of {environment.world_size} on {socket.gethostname()}"
            print(f"PantheraML: {where} failed:", file=sys.stderr)  # noqa: T201
            self._show(kind, value, trace)


def _leave_in_peace() -> None:
    """Let this process end with its own exit code: the agent ends all ranks as soon as the first of them has."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _record is not None:
        _record.end()


def _hide_progress() -> None:
    """No progress bars of the libraries that draw one in every rank; a library that is not imported yet is left so."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for name, function in (
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets.utils", "disable_progress_bars"),
        ("huggingface_hub.utils", "disable_progress_bars"),
    ):
        module = sys.modules.get(name)
        if module is not None:
            getattr(module, function)()
