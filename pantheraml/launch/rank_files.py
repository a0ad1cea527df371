"""What the ranks of a machine leave for their agent, as small files in the folder that they share with it.

How far a rank has come and whether it has come to its end, why the ranks hang, and the first traceback: what an exit
code does not say.
"""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pantheraml.errors import PantheraMLError
from pantheraml.launch.environment import LaunchEnvironment

# Exit code of ranks that their watchdog ended; timeout(1) has the same.
HUNG = 124

# Names of files: the rank whose traceback was shown; an error that would come again; the rank that hung.
_FIRST, _FINAL, _HANG = "first", "final", "hang"
# Bytes of a rank's record, so that a write replaces the one before.
_WIDTH = 64


@dataclass(frozen=True)
class Record:
    """How far the process of a rank has come.

    Attributes:
        step: the last one that is done; None before it trains.
        steps: how many it has done since it was started.
        ended: whether Python has come to its normal end; ``os._exit`` and signals leave it at False.
    """

    step: int | None = None
    steps: int = 0
    ended: bool = False


class OwnRecord:
    """The record of this process, which it writes: some microseconds for each change.

    Args:
        folder: shared with the agent.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        # Programs that a rank starts inherit its variables and write records of their own.
        self._file = os.open(_record_path(folder, rank, os.getpid()), os.O_WRONLY | os.O_CREAT, 0o600)
        self._record = Record()
        self._write()

    def begin(self, step: int) -> None:
        """Training begins, or goes on, after ``step``."""
        self._record = Record(step, self._record.steps)
        self._write()

    def done(self, step: int) -> None:
        """A step is done."""
        self._record = Record(step, self._record.steps + 1)
        self._write()

    def end(self) -> None:
        """Python ends as it should."""
        self._record = Record(self._record.step, self._record.steps, ended=True)
        self._write()

    def _write(self) -> None:
        record = self._record
        step = "-" if record.step is None else record.step
        with suppress(OSError):  # a full disk, or the agent and its folder are gone
            os.pwrite(self._file, f"{step} {record.steps} {int(record.ended)}".ljust(_WIDTH).encode(), 0)


def read_record(folder: Path, rank: int, pid: int) -> Record:
    """The record of a rank's process; an empty one if it has left none."""
    try:
        step, steps, ended = _record_path(folder, rank, pid).read_text().split()
    except (OSError, ValueError):
        return Record()
    return Record(None if step == "-" else int(step), int(steps), ended == "1")


def _record_path(folder: Path, rank: int, pid: int) -> Path:
    return folder / f"record_{rank}_{pid}"


def record_failure(environment: LaunchEnvironment, folder: Path, error: BaseException) -> bool:
    """Keep the traceback of a failure.

    Args:
        environment: of the rank that fails.
        folder: the agent's.
        error: with its traceback.

    Returns:
        Whether no other rank of the machine has failed before.
    """
    (folder / f"rank_{environment.rank}.txt").write_text("".join(traceback.format_exception(error)))
    try:
        with (folder / _FIRST).open("x") as file:
            file.write(str(environment.rank))
    except FileExistsError:
        return False
    if isinstance(error, PantheraMLError):
        (folder / _FINAL).touch()
    return True


def first_failure(folder: Path) -> int | None:
    """The rank whose traceback was the first; None if none has left one."""
    file = folder / _FIRST
    return int(file.read_text()) if file.exists() else None


def failures(folder: Path) -> set[int]:
    """The ranks that have left a traceback."""
    return {int(file.stem.removeprefix("rank_")) for file in folder.glob("rank_*.txt")}


def would_come_again(folder: Path) -> bool:
    """Whether the first failure is an error of ours, which says what to change, so that it would come again."""
    return (folder / _FINAL).exists()


def record_hang(folder: Path, rank: int, said: str) -> None:
    """Tell the agent of this machine why its ranks end; the first of them that does so counts.

    Args:
        folder: the agent's.
        rank: which one hung.
        said: what is to be told of it.

    Raises:
        OSError: it cannot be written.
    """
    whole = folder / f"{_HANG}_{os.getpid()}"
    whole.write_text(f"{rank}\n{said}")
    with suppress(FileExistsError):
        (folder / _HANG).hardlink_to(whole)


def recorded_hang(folder: Path) -> tuple[int, str] | None:
    """The rank that hung and what is to be said of it, if that was why the ranks of this machine ended."""
    file = folder / _HANG
    if not file.exists():
        return None
    rank, said = file.read_text().split("\n", 1)
    return int(rank), said


def forget_end(folder: Path) -> None:
    """Remove what says how ranks ended: they are started again."""
    for pattern in ("rank_*", "record_*", f"{_HANG}*", _FIRST, _FINAL):
        for file in folder.glob(pattern):
            file.unlink()
