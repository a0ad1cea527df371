"""A thread of each rank that notices when a run hangs; then the run ends with a report, instead of not at all.

The training thread says that it goes on by writing an attribute. How long it may be without doing so:

    a step                          ``hang_seconds``, or three times the longest time between two such words so far,
                                      times how much more there is to compute than in any step before
    what each rank does by itself   likewise; the others may wait for it
    the next token of a generation  likewise; behind the last one a rank waits for the others, which is not counted
    the first step, the first rows  twelve times ``hang_seconds``: kernels are compiled, caches filled, workers started
      of an epoch
    callbacks, saving, evaluating,  ``timeout_minutes``, after which a collective would fail, too
      a stream's rows, what is
      resumed, Python that moves
    a debugger's prompt             for ever

Until two steps are done, the first counts for the longest time. While a rank is about something that may take long, the
others may wait for it; the largest limit of all ranks counts for each. Each rank tells the others every second how it
is, through the store at which they met; who tells nothing is measured by the limit that it told last. What happens then
is in ``hang_end``.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from pantheraml.distributed.activity import Activity
from pantheraml.distributed.hang_end import HangEnd
from pantheraml.distributed.heartbeats import Beat, Clock, Heartbeats, Place
from pantheraml.distributed.stacks import StacksFile
from pantheraml.launch.environment import LaunchEnvironment

Allowance = Literal["step", "alone", "token", "first", "patient"]
# Those whose limit is that of a step, and those that count for the longest.
_OF_A_STEP, _COUNTED = ("step", "alone", "token"), ("step", "alone")
# Times the longest step so far, and times hang_seconds.
_OF_STEPS, _OF_FIRST = 3.0, 12.0
# Seconds between two words of a rank, more where more ranks than this talk at a time.
_BEAT, _RANKS_A_BEAT = 1.0, 64
# Seconds for the thread to end.
_STOP, _END = 5.0, 30.0


class Mark(NamedTuple):
    """The last word of the training thread: when it was, in which step, about what, and how long that may take."""

    at: float
    step: int
    phase: str
    number: int
    allowance: Allowance


class Watchdog:
    """Watches the thread that starts it, and with it the run.

    Args:
        seconds: without progress, after which a step is taken for one that hangs.
        patience: the same for what may take long.
        folder: where the report is written.
        rank: this one.
        world_size: number of ranks; a single one talks to no store.
        connect: opens a connection to the store; needed where there are several ranks.
        name: the same on all ranks, and of this run of a trainer alone.

    Attributes:
        resumed: whether a checkpoint is read before the first step, which may take long then.
    """

    def __init__(
        self,
        seconds: float,
        patience: float,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
        connect: Callable[[], Store] | None = None,
        name: str = "watch",
    ) -> None:
        self._seconds, self._patience, self._folder = seconds, max(patience, seconds), folder
        self._rank, self._world_size, self._connect, self._name = rank, world_size, connect, name
        self._interval = min(_BEAT, seconds / 4) * max(1, world_size / _RANKS_A_BEAT)
        # Who was not heard for so long cannot take part in the report.
        self._silence = max(2.5 * self._interval, seconds / 4)
        self.resumed = False
        self._clock = Clock()
        self._first_step: int | None = None
        self._longest_first = self._longest = 0.0
        self._work = self._most_work = 0.0  # of the step at hand, and of those before it
        self._mark = Mark(self._clock.now(), 0, "starting", 0, "first")
        self._busy = self._left = ""
        self._number, self._told, self._moved_at = 0, -1, -math.inf
        self._over = threading.Event()

    # --- the training thread --------------------------------------------------------------------------------

    def progress(self, step: int, phase: str, allowance: Allowance = "step") -> None:
        """Training goes on. This takes some microseconds, and asks nobody.

        Args:
            step: the step it is in.
            phase: what comes next.
            allowance: how long that may take; the first step is a first one anyway.
        """
        if self._first_step is None:
            self._first_step = step
        if allowance in _OF_A_STEP and step <= self._first_step:
            allowance = "first"
        if self._busy:
            phase, allowance = self._busy, "patient"
        self._set(step, phase, allowance)

    def begins(self, work: float) -> None:
        """A step begins.

        Args:
            work: how much there is to compute, in any unit; 0 where nobody knows.
        """
        self._most_work, self._work = max(self._most_work, self._work), work

    @contextmanager
    def patient(self, phase: str) -> Iterator[None]:
        """What is done in the block may take as long as a collective may; ``progress`` begins that time anew."""
        around, before = self._busy, self._mark
        self._busy = around or phase
        self._set(before.step, self._busy, "patient")
        try:
            yield
        finally:
            self._busy = around
            self._set(before.step, before.phase, before.allowance)

    def start(self) -> None:
        """Begin to watch the thread that calls this."""
        thread = threading.get_ident()
        self._stacks = StacksFile()
        self._place = Place(socket.gethostname(), os.getpid(), thread, self._stacks.name)
        self._activity = Activity(thread)
        self._end = HangEnd(self._folder, self._rank, self._stacks, self._seconds)
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._watch, name="pantheraml-watch", daemon=True)
        self._thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Tell the others that this rank trains no more, and end the thread.

        Args:
            error: why; None: all is done.
        """
        why = "has left train()" if error is None else f"has failed with {type(error).__name__}: {error}"
        self._left = why[:500]
        self._over.set()
        self._thread.join(_END if self._end.begun else _STOP)  # one that is about a report ends this process
        self._stacks.close()

    def _set(self, step: int, phase: str, allowance: Allowance) -> None:
        last, now = self._mark, self._clock.now()
        if last.allowance in _COUNTED:
            self._longest = max(self._longest, now - last.at)
        elif last.allowance == "first" and last.step == self._first_step:
            self._longest_first = max(self._longest_first, now - last.at)
        self._mark = Mark(now, step, phase, last.number + 1, allowance)

    # --- the thread that watches ----------------------------------------------------------------------------

    def limit(self) -> float:
        """Seconds that the last word of the training thread may be old."""
        mark, first = self._mark, self._first_step
        if mark.allowance == "patient" or (self.resumed and (first is None or mark.step <= first)):
            return self._patience
        if mark.allowance == "first":
            return _OF_FIRST * self._seconds
        longest = self._longest
        if first is not None and mark.step <= first + 1:
            longest = max(longest, self._longest_first)
        usual = max(self._seconds, _OF_STEPS * longest)
        if not 0 < self._most_work < self._work:
            return usual
        return max(usual, min(_OF_STEPS * longest * self._work / self._most_work, self._patience))

    def _beat(self) -> Beat:
        """What this rank tells of itself."""
        self._number += 1
        mark, now = self._mark, self._clock.now()
        limit, is_patient, since = self.limit(), mark.allowance != "step", mark.at
        if now - mark.at > self._silence:  # until then nobody asks
            if self._activity.is_debugged():
                limit, is_patient = math.inf, True
            elif self._activity.has_moved(within=max(2.0, self._silence)):
                self._moved_at, limit, is_patient = now, max(limit, self._patience), True
            else:
                since = max(mark.at, self._moved_at)
        return Beat(
            self._place, self._number, mark.step, mark.phase, mark.number, max(0.0, now - since), limit, is_patient,
            self._left,
        )  # fmt: skip

    def _watch(self) -> None:
        if self._gpu is not None:  # a new thread begins on GPU 0, where the flight recorder would take memory
            torch.cuda.set_device(self._gpu)
        with suppress(RuntimeError):  # the store is gone: the run is over
            is_alone = self._connect is None or self._world_size == 1
            look = self._look_alone if is_alone else self._look_around()
            is_over = False
            while not is_over:
                is_over = self._over.wait(self._interval)
                self._clock.tick(self._interval, self._silence)
                if not is_alone:  # nobody would read them
                    self._stacks.wind_up(self._silence)
                look(self._beat())

    def _look_alone(self, beat: Beat) -> None:
        """Report a process that is a run by itself, once for each hang."""
        if beat.idle > beat.limit and self._told != beat.marks and not beat.left:
            self._told = beat.marks
            self._end.alone(beat, is_rank=LaunchEnvironment.detect().is_rank)

    def _look_around(self) -> Callable[[Beat], None]:
        """Tell and read; raise an alarm where a rank is late, twice; and take part in the end once there is one."""
        assert self._connect is not None
        unseen = [Beat(None, limit=self._patience) for _ in range(self._world_size)]
        talk = Heartbeats(self._connect(), self._name, self._rank, unseen, self._clock)
        before = set[tuple[int, int]]()

        def look(beat: Beat) -> None:
            nonlocal before
            talk.exchange(beat)
            late = talk.overdue()
            # What was told may be a moment old.
            if late & before and not beat.left and talk.claim("claimed"):
                talk.put("alarm", json.dumps(talk.living(self._silence)))
            before = late
            if not beat.left and talk.has("alarm"):
                self._end.together(talk)

        return look
