"""Python stacks of this process and of others of its machine, also of those that cannot tell theirs.

A process whose lock is held by a C function runs no Python. ``faulthandler`` writes its stacks all the same, from the
handler of a signal, which needs no lock. (SIGUSR1 and SIGUSR2 are left to batch systems and programs.)
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import psutil

from pantheraml.launch.environment import AGENT

# (file, line, function), the innermost first.
Frame = tuple[str, int, str]

SIGNAL: int | None = signal.SIGRTMAX - 5 if hasattr(signal, "SIGRTMAX") else None
# Frames of a thread that are told.
_MOST_FRAMES = 60
# Seconds for a process to write its stacks after the signal, and without more of them until they are all there.
_ANSWER, _QUIET = 2.0, 0.1
# Threads of ours that only watch.
OWN = "pantheraml-watch"

# Where they run, as faulthandler tells it: it has no names of threads.
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
        name: as Python calls it, or its number.
        trains: whether it is the one that trains.
        frames: the innermost first.
    """

    name: str
    trains: bool
    frames: tuple[Frame, ...]

    def lines(self) -> list[str]:
        """As text, the innermost first."""
        return [
            f"  {self.name}{' (trains)' if self.trains else ''}:",
            *(f"    {file}:{line} {function}()" for file, line, function in self.frames),
        ]


@dataclass(frozen=True)
class Stacks:
    """What is known of one process.

    Attributes:
        threads: the one that trains first; empty if they cannot be had.
        note: why they cannot, or how they were had, as a clause; mostly empty.
        flight: what NCCL's flight recorder tells, if there is one.
    """

    threads: tuple[Thread, ...] = ()
    note: str = ""
    flight: str = ""

    def written(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)

    @classmethod
    def read(cls, found: dict[str, Any]) -> Stacks:
        """What ``written`` wrote."""
        threads = (
            Thread(one["name"], one["trains"], tuple((f, n, name) for f, n, name in one["frames"]))
            for one in found["threads"]
        )
        return cls(tuple(threads), found["note"], found["flight"])

    @property
    def frames(self) -> tuple[Frame, ...]:
        """Of the thread that trains."""
        return next((thread.frames for thread in self.threads if thread.trains), ())


def own_stacks(trains: int) -> tuple[Thread, ...]:
    """Stacks of this process's threads, without those that only watch; the one numbered ``trains`` comes first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = [
        Thread(names.get(ident, f"thread {ident:#x}"), ident == trains, tuple(_frames(frame)))
        for ident, frame in sys._current_frames().items()
        if not names.get(ident, "").startswith(OWN)
    ]
    return tuple(sorted(found, key=lambda thread: not thread.trains))


def _frames(frame: FrameType | None) -> Iterable[Frame]:
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


class SignalledStacks:
    """A file to which this process writes the stacks of all threads whenever the signal comes.

    Attributes:
        file: that file; None where there is no such signal, or the program takes it itself.
    """

    def __init__(self) -> None:
        self.file: Path | None = None
        if SIGNAL is None or signal.getsignal(SIGNAL) not in (signal.SIG_DFL, None):
            return
        # The agent removes its folder, also where a rank is killed.
        self._open, name = tempfile.mkstemp(prefix="pantheraml-stacks-", dir=os.environ.get(AGENT) or None)
        self.file = Path(name)
        faulthandler.register(SIGNAL, file=self._open, all_threads=True)

    def close(self) -> None:
        """Be as before."""
        if self.file is not None and SIGNAL is not None:
            faulthandler.unregister(SIGNAL)
            os.close(self._open)
            self.file.unlink(missing_ok=True)
            self.file = None


def ask(pid: int, file: Path, trains: int, seconds: float = _ANSWER) -> Stacks:
    """Stacks of another process of this machine, which has made ``SignalledStacks``.

    A process that is stopped goes on to tell them, and so does one in a call that signals end.

    Args:
        pid: its number.
        file: where it writes them.
        trains: number of its thread that trains.
        seconds: how long it may take.
    """
    state = state_of(pid)
    if SIGNAL is None or state == "has ended" or not _answers(pid, SIGNAL):
        return Stacks(note=state or "does not tell its stacks")
    try:
        with file.open("rb") as written:  # a process that goes on may end, and remove its file
            written.seek(0, os.SEEK_END)
            os.kill(pid, SIGNAL)
            if state.startswith("is stopped"):
                os.kill(pid, signal.SIGCONT)
            text = _read_until_quiet(written, seconds)
    except OSError as error:
        return Stacks(note=state or f"cannot be asked for its stacks ({error})")
    threads = parse(text, trains)
    return Stacks(threads, note=state or ("" if threads else "does not answer signals"))


def _read_until_quiet(written: BinaryIO, seconds: float) -> str:
    """What comes into a file until no more does."""
    text, began = b"", time.monotonic()
    last = began
    while time.monotonic() - began < seconds and (not text or time.monotonic() - last < _QUIET):
        time.sleep(0.02)
        more = written.read()
        text, last = text + more, time.monotonic() if more else last
    return text.decode(errors="replace")


def state_of(pid: int) -> str:
    """What the system says of a process that runs no Python, as a clause; empty if nothing is known."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "has ended"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "is stopped (SIGSTOP, or a debugger)"
    return {
        psutil.STATUS_ZOMBIE: "has ended",
        psutil.STATUS_DEAD: "has ended",
        psutil.STATUS_DISK_SLEEP: "waits for a disk or a driver and hears no signal",
    }.get(status, "")


def _answers(pid: int, number: int) -> bool:
    """Whether the process takes the signal: it ends those that do not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def parse(text: str, trains: int) -> tuple[Thread, ...]:
    """The threads of what ``faulthandler`` wrote; the one numbered ``trains`` comes first."""
    found: list[Thread] = []
    for block in re.split(r"^(?=(?:Current t|T)hread 0x)", text, flags=re.MULTILINE):
        head = re.match(r"(?:Current t|T)hread 0x([0-9a-f]+)", block)
        if head is None:
            continue
        frames = [
            (file, int(line), function)
            for file, line, function in re.findall(
                r'^  File "(.*)", line (\d+) in (.*)$', block, re.MULTILINE
            )
        ]
        ident = int(head[1], 16)
        if not any(Path(file) == _WATCHDOG for file, _, _ in frames):
            name = "MainThread" if ident == trains else f"thread {ident:#x}"
            found.append(Thread(name, ident == trains, tuple(frames[:_MOST_FRAMES])))
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
            elif (
                function == "_engine_run_backward" and found is None
            ):  # DDP's reduction is waited for at its end
                found = "backward"
        elif found is None:
            return None
        elif found is not None and not path.endswith(_WRAPPERS):
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


def flight_record() -> str:
    """What torch's flight recorder knows of the collectives; empty without one."""
    from torch._C import _distributed_c10d as c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(c10d, name, None)
        if dump is not None:
            try:
                text = dump()
            except RuntimeError:
                continue
            return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return ""
