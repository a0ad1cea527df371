"""Whether a thread that says nothing is at work: what a watchdog must not take for a hang.

Waiting shows itself: a thread that sleeps, or waits for a lock, a socket or a GPU, stands at the same instruction of
Python for as long as it does. One that tokenises, compiles or writes rows does not, and one that waits for its own
processes to do so has processes that use the CPU. A loop around a single long call stands still, too, but uses the CPU
itself; where there is a GPU, that says nothing, since a host that waits for one asks again and again.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType

import psutil
import torch

# Share of one core from which on a thread, or a process's children, are at work; trackers use a few percent, and who
# computes may share the cores with many.
_BUSY = 0.1
_DEBUGGERS = ("pdb.py", "bdb.py")


class Activity:
    """Looks at a thread of this process from another one, now and then.

    Args:
        thread: as ``threading.get_ident`` numbers it.
    """

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._position: tuple[tuple[CodeType, int], ...] = ()
        self._used: dict[int, float] = {}  # seconds of CPU by process; 0 is the thread
        self._at = -math.inf
        has_clock = hasattr(time, "pthread_getcpuclockid") and not torch.cuda.is_initialized()
        self._cpu_clock = time.pthread_getcpuclockid(thread) if has_clock else None

    def has_moved(self, within: float) -> bool:
        """Whether the thread, or a child of this process, has worked since the last look.

        Args:
            within: seconds; a look that is older than that says nothing.
        """
        now = time.monotonic()
        before, used, passed = self._position, self._used, now - self._at
        self._position, self._used, self._at = self._now(), {}, now
        if self._position != before:
            return passed < within
        # To ask for children takes Python's lock for every process of the machine; it is free where the thread waits.
        self._used = _used_by_children()
        if self._cpu_clock is not None:
            self._used[0] = time.clock_gettime(self._cpu_clock)
        worked = sum(seconds - used[pid] for pid, seconds in self._used.items() if pid in used)
        return passed < within and worked > _BUSY * passed

    def is_debugged(self) -> bool:
        """Whether somebody looks at the thread with a debugger of Python's."""
        frame = self._frame()
        while frame is not None:
            file = frame.f_code.co_filename
            if Path(file).name in _DEBUGGERS or "pydevd" in file:
                return True
            frame = frame.f_back
        return False

    def _now(self) -> tuple[tuple[CodeType, int], ...]:
        found: list[tuple[CodeType, int]] = []
        frame = self._frame()
        while frame is not None:
            found.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        return tuple(found)

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._thread)


def _used_by_children() -> dict[int, float]:
    """Seconds of CPU that each process below this one has used so far, by its number."""
    found: dict[int, float] = {}
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = child.cpu_times()
                found[child.pid] = times.user + times.system
    return found
