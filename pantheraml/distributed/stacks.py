"""Python stacks of the threads of a rank, as ``faulthandler`` writes them: also where a call holds Python's lock.

faulthandler's own timer needs no lock. It is wound up anew at every heartbeat, so that it writes only where the
heartbeat stands still.
"""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pantheraml.launch.environment import AGENT

# (file, line, function), the innermost first.
Frame = tuple[str, int, str]

# The thread that beats, by the file where it runs.
_WATCHDOG = Path(__file__).with_name("watchdog.py")
# Calls in which a rank waits for others.
_COLLECTIVES = re.compile(
    r"(all_reduce|all_gather|all_to_all|reduce_scatter|broadcast|barrier|reduce|gather|scatter|send|recv|wait"
    r"|monitored_barrier|batch_isend_irecv)(_\w+)?"
)
# Whose line says nothing of where a collective was asked for.
_WRAPPERS = ("/contextlib.py", "/pantheraml/distributed/process_group.py")


@dataclass(frozen=True)
class Thread:
    """The stack of one thread.

    Attributes:
        trains: whether it is the one that trains.
        frames: the innermost first.
    """

    trains: bool
    frames: tuple[Frame, ...]

    def lines(self) -> list[str]:
        """As text, the innermost first."""
        return [
            f"  {'the thread that trains' if self.trains else 'another thread'}:",
            *(f"    {file}:{line} {function}()" for file, line, function in self.frames),
        ]


class StacksFile:
    """The file of this process's stacks."""

    def __init__(self) -> None:
        self._is_closed = False
        # The agent removes its folder, also where a rank is killed.
        self._open, self.name = tempfile.mkstemp(
            prefix="pantheraml-stacks-", dir=os.environ.get(AGENT) or None
        )

    def wind_up(self, seconds: float) -> None:
        """Write the stacks in so many seconds, unless this is called before."""
        if not self._is_closed:  # another file may have its number by now
            faulthandler.dump_traceback_later(seconds, file=self._open)

    def now(self) -> str:
        """The stacks of this moment."""
        os.ftruncate(self._open, 0)
        os.lseek(self._open, 0, os.SEEK_SET)
        faulthandler.dump_traceback(self._open)
        return read_stacks(self.name)

    def close(self) -> None:
        """Remove the file."""
        self._is_closed = True
        faulthandler.cancel_dump_traceback_later()
        os.close(self._open)
        Path(self.name).unlink(missing_ok=True)


def read_stacks(file: str) -> str:
    """What was written to a ``StacksFile`` last; empty if nothing was, or it is on another machine."""
    try:
        text = Path(file).read_text(errors="replace")
    except OSError:
        return ""
    # One thread is written after the other, the one that beats among them; the timer writes a line before.
    return re.split(r"^Timeout .*$", text, flags=re.MULTILINE)[-1]


def why_silent(pid: int) -> str:
    """What the system says of a process of this machine that runs no Python, as a clause; empty if nothing is known."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "has ended"
    return {
        psutil.STATUS_STOPPED: "is stopped (SIGSTOP, or a debugger)",
        psutil.STATUS_TRACING_STOP: "is stopped (SIGSTOP, or a debugger)",
        psutil.STATUS_ZOMBIE: "has ended",
        psutil.STATUS_DEAD: "has ended",
        psutil.STATUS_DISK_SLEEP: "waits for a disk or a driver",
    }.get(status, "")


def parse(text: str, trains: int) -> tuple[Thread, ...]:
    """The threads of what ``faulthandler`` wrote, but the one that beats; the one numbered ``trains`` comes first."""
    found: list[Thread] = []
    for block in re.split(r"^(?=(?:Current t|T)hread 0x)", text, flags=re.MULTILINE):
        head = re.match(r"(?:Current t|T)hread 0x([0-9a-f]+)", block)
        calls = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', block, re.MULTILINE)
        frames = tuple((file, int(line), function) for file, line, function in calls)
        if head is not None and not any(Path(file) == _WATCHDOG for file, _, _ in frames):
            found.append(Thread(int(head[1], 16) == trains, frames))
    return tuple(sorted(found, key=lambda thread: not thread.trains))


def collective_of(frames: Iterable[Frame]) -> tuple[str, Frame] | None:
    """The collective in which a thread waits, and the frame that called it; None if it is in none."""
    found = None
    for frame in frames:
        file, _, function = frame
        path = file.replace(os.sep, "/")
        if "/torch/" in path:
            if "/torch/distributed/" in path and _COLLECTIVES.fullmatch(function):
                found = function
            elif function == "_engine_run_backward" and found is None:
                found = "backward"  # DDP's reduction is waited for at its end
        elif found is None:
            return None
        elif not path.endswith(_WRAPPERS):
            return found, frame
    return None


def is_of_python(frame: Frame) -> bool:
    """Whether it is in Python's own library, as the waits of locks and pipes are."""
    path = frame[0].replace(os.sep, "/")
    return path.startswith("<") or ("/lib/python3" in path and "-packages/" not in path)


def place(frame: Frame) -> str:
    """``data.py:12 read()``"""
    file, line, function = frame
    return f"{Path(file).name}:{line} {function}()"
