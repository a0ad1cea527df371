"""A thread of each rank that notices when a run hangs; then the run ends with a report, instead of not at all.

The training thread says that it goes on by writing an attribute. How long it may be without doing so:

    a step                    ``hang_seconds``, or three times the longest time between two such words so far
    the first step,           twelve times ``hang_seconds``: kernels are compiled, caches filled, samples generated
      callbacks, epochs' ends
    saving, evaluating,       ``timeout_minutes``, after which a collective would fail, too
      what is resumed

Until two steps are done, the first counts for the longest time. While a rank is about something that may take long, the
others may wait for it; the largest limit of all ranks counts for each. Each rank tells the others every second how it
is, through the store at which they met; who tells nothing is measured by the limit that it told last. What happens then
is in ``hang_end``.
"""

from __future__ import annotations

import faulthandler
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from pantheraml.distributed.hang_end import HangEnd
from pantheraml.distributed.heartbeats import Beat, Clock, Heartbeats, Place
from pantheraml.distributed.stacks import OWN, SignalledStacks

Allowance = Literal["step", "first", "long", "patient"]
# Times the longest step so far, and times hang_seconds.
_OF_STEPS, _OF_LONG = 3.0, 12.0
# What may be as long as a first step.
LONG_PHASES = ("callbacks", "between epochs", "ending")
# Seconds between two words of a rank, more where more ranks than this talk at a time.
_BEAT, _RANKS_A_BEAT = 1.0, 64
# Seconds for the store to answer, and for the end of a run that hangs.
_STORE, _END = 5.0, 30.0
_STDERR, _LONGEST_TIMER = 2, 1e6


class Mark(NamedTuple):
    """The last word of the training thread: when it was, in which step, about what, and how long that may take."""

    at: float
    step: int
    phase: str
    number: int
    allowance: Allowance


class Watchdog:
    """Watches the thread that starts it, and with it the run. A single process reports and goes on.

    Args:
        seconds: without progress, after which a step is taken for one that hangs.
        patience: the same for what may take long.
        folder: where the report is written.
        rank: this one.
        world_size: number of ranks; a single one talks to no store.
        connect: opens a connection to the store; needed where there are several ranks.
        name: the same on all ranks, and of this run of a trainer alone.
        resumed: whether rows are skipped before the first step.
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
        resumed: bool = False,
    ) -> None:
        self._seconds, self._patience, self._folder = seconds, max(patience, seconds), folder
        self._rank, self._world_size, self._connect, self._name = rank, world_size, connect, name
        self._interval = min(_BEAT, seconds / 4) * max(1, world_size / _RANKS_A_BEAT)
        # Who was not heard for so long cannot take part in the report.
        self._silence = max(2.5 * self._interval, seconds / 4)
        self._resumed = resumed
        self._clock = Clock()
        self._first_step: int | None = None
        self._longest_first = self._longest = 0.0
        self._mark = Mark(self._clock.now(), 0, "starting", 0, "first")
        self._busy = self._left = ""
        self._number = 0
        self._over, self._wake, self._alarm = threading.Event(), threading.Event(), threading.Event()
        self._talk: Heartbeats | None = None
        self._answered = self._clock.now()
        self._threads: list[threading.Thread] = []

    # --- the training thread --------------------------------------------------------------------------------

    def progress(self, step: int, phase: str) -> None:
        """Training goes on. This takes a microsecond, and asks nobody.

        Args:
            step: the step it is in.
            phase: what comes next.
        """
        last, now = self._mark, self._clock.now()
        if self._first_step is None:
            self._first_step = step
        if last.allowance == "step":
            self._longest = max(self._longest, now - last.at)
        elif last.allowance == "first":
            self._longest_first = max(self._longest_first, now - last.at)
        allowance: Allowance = "first" if step <= self._first_step else "step"
        if phase in LONG_PHASES:
            allowance = "long"
        if self._busy:
            phase, allowance = self._busy, "patient"
        self._mark = Mark(now, step, phase, last.number + 1, allowance)

    @contextmanager
    def patient(self, phase: str) -> Iterator[None]:
        """What is done in the block may take as long as a collective may; ``progress`` begins that time anew."""
        around, before = self._busy, self._mark
        self._busy = phase
        self._mark = before._replace(
            at=self._clock.now(), phase=phase, number=before.number + 1, allowance="patient"
        )
        try:
            yield
        finally:
            self._busy = around
            self._mark = before._replace(at=self._clock.now(), number=self._mark.number + 1)

    def start(self) -> None:
        """Begin to watch the thread that calls this."""
        self._signalled = SignalledStacks()
        self._place = Place.here(self._rank, self._signalled.file)
        self._end = HangEnd(self._folder, self._place, self._silence)
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        if self._world_size > 1:
            self._threads.append(threading.Thread(target=self._converse, name=f"{OWN}-talk", daemon=True))
        self._threads.append(threading.Thread(target=self._watch, name=OWN, daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Tell the others that this rank trains no more, and end the threads.

        Args:
            error: why; None: all is done.
        """
        self._left = (
            "has left train()" if error is None else f"has failed with {type(error).__name__}: {error}"[:500]
        )
        self._over.set()
        self._wake.set()
        for thread in self._threads:  # one that is about a report ends this process
            thread.join(_END if self._end.begun else _STORE)
        faulthandler.cancel_dump_traceback_later()
        self._signalled.close()

    # --- the other threads ----------------------------------------------------------------------------------

    def limit(self) -> float:
        """Seconds that the last word of the training thread may be old."""
        mark, first = self._mark, self._first_step
        if mark.allowance == "patient" or (mark.allowance == "first" and self._resumed):
            return self._patience
        if mark.allowance != "step":
            return _OF_LONG * self._seconds
        longest = self._longest
        if first is not None and mark.step <= first + 1:
            longest = max(longest, self._longest_first)
        return max(self._seconds, _OF_STEPS * longest)

    def _idle(self) -> float:
        return max(0.0, self._clock.now() - self._mark.at)

    def _beat(self) -> Beat:
        """What this rank tells of itself."""
        self._number += 1
        mark = self._mark
        return Beat(
            self._place, self._number, mark.step, mark.phase, mark.number, self._idle(), self.limit(),
            mark.allowance != "step", self._left,
        )  # fmt: skip

    def _watch(self) -> None:
        """Look at the table again and again, and set the alarm; without an answer of the store, end the run alone."""
        told, before, ending = -1, set[tuple[int, int]](), 0.0
        while not self._over.wait(self._interval):
            self._clock.tick(self._interval, self._silence)
            if self._end.begun:  # by the other thread, whose store may be lost meanwhile
                ending += self._interval
                if ending > _END:
                    self._end.give_up()
                continue
            talk, is_late = self._talk, self._idle() > self.limit()
            self._write_stacks_if_locked(talk)
            if talk is None:  # alone, or in a group that met nowhere
                if is_late and told != self._mark.number:
                    told = self._mark.number
                    self._end.tell([self._beat()], self._seconds)
                continue
            late = talk.overdue()
            if self._clock.now() - self._answered < _STORE + self._interval:
                if late & before:  # what was told may be a moment old
                    self._alarm.set()
                    self._wake.set()
            elif is_late and self._is_lost(talk):
                self._end.without_store(talk, self._beat(), self._seconds)
            before = late

    def _is_lost(self, talk: Heartbeats) -> bool:
        """Whether a rank that is late, and hears of no other, waits for one that does not come.

        That may be about something that takes long, unless it is seen to do nothing.
        """
        if talk.is_busy(but=self._rank):
            return False
        return self._idle() > _OF_LONG * self._seconds or self._end.misses_one(talk)

    def _converse(self) -> None:
        """Tell and read every second, and take part in the report once there is an alarm."""
        if self._gpu is not None:  # a new thread begins on GPU 0, where the flight recorder would take memory
            torch.cuda.set_device(self._gpu)
        assert self._connect is not None
        # Where the store is gone, the watching thread goes on with what is known.
        with suppress(RuntimeError, KeyError):
            unseen = [Beat(None, limit=self._patience) for _ in range(self._world_size)]
            talk = Heartbeats(self._connect(), self._name, unseen, self._clock)
            while True:
                self._wake.clear()
                talk.exchange(self._beat())
                self._talk, self._answered = talk, self._clock.now()
                if self._left:
                    return
                if self._alarm.is_set() and not self._end.begun and talk.claim("claimed"):
                    talk.put("alarm", json.dumps(self._end.living(talk)))
                if talk.has("alarm"):
                    self._end.with_store(talk, self._seconds)
                self._wake.wait(self._interval)

    def _write_stacks_if_locked(self, talk: Heartbeats | None) -> None:
        """Have the stacks written to stderr by a thread that needs no lock of Python's, if this one stands still.

        Where other ranks of this machine would see it, they ask for the stacks.
        """
        if talk is not None and self._end.beside(talk):
            faulthandler.cancel_dump_traceback_later()
            return
        left = max(0.0, self.limit() - self._idle())
        with suppress(OSError, ValueError):  # there may be no stderr
            seconds = left + self._interval + self._seconds / 3
            faulthandler.dump_traceback_later(min(seconds, _LONGEST_TIMER), file=_STDERR)
