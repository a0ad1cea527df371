"""What the ranks of a run tell one another while they train: a few words each, through the run's store.

Nobody waits here: a rank writes where it is and reads what the others wrote. How old that is, its own clock
tells.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Place:
    """Where a rank runs, as others find it.

    Attributes:
        rank: its number.
        host: name of its machine.
        machine: the same for processes that see one another by their ids.
        pid: its process.
        born: when that began, in seconds since 1970: another process may get its id later.
        thread: the one that trains, as ``threading.get_ident`` numbers it.
        stacks: file to which it writes its stacks when it gets a signal; empty if it does not.
    """

    rank: int
    host: str
    machine: str
    pid: int
    born: float
    thread: int
    stacks: str

    @classmethod
    def here(cls, rank: int, stacks: Path | None) -> Place:
        """That of the calling thread."""
        return cls(
            rank,
            socket.gethostname(),
            _machine(),
            os.getpid(),
            psutil.Process().create_time(),
            threading.get_ident(),
            str(stacks or ""),
        )


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    Attributes:
        place: where it runs; None before it has told anything.
        number: counts what it told.
        step: the step it is in.
        phase: what it does there.
        marks: how often its training thread said that it goes on.
        idle: seconds since it last did.
        limit: seconds for which it may be so.
        patient: whether what it does may take long.
        left: why it trains no more; empty while it does.
    """

    place: Place | None
    number: int = 0
    step: int = 0
    phase: str = "before train()"
    marks: int = 0
    idle: float = 0.0
    limit: float = 0.0
    patient: bool = True
    left: str = ""

    def written(self) -> str:
        """As text that the store can keep."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: bytes) -> Beat:
        """What ``written`` wrote."""
        found = json.loads(text)
        return cls(**{**found, "place": Place(**found["place"])})


class Clock:
    """Seconds that stand still while this process does: stopped by a signal, frozen with its machine, or locked.

    Otherwise whoever goes on after an hour would take everybody for dead.
    """

    def __init__(self) -> None:
        self._lost, self._last = 0.0, time.monotonic()

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic() - self._lost

    def tick(self, expected: float, slack: float) -> None:
        """Called about every ``expected`` seconds; what it is late by more than ``slack`` seconds counts for nobody."""
        now = time.monotonic()
        late = now - self._last - expected
        if late > slack:
            self._lost += late
        self._last = now


class Heartbeats:
    """The table of all ranks, as one of them sees it. Used by one thread; ``table`` may be read by any.

    Args:
        store: a connection of this thread's own.
        name: of this table, the same on all ranks.
        first: what is known of each rank before it tells anything, by rank.
        clock: measures how old a word is.
    """

    def __init__(self, store: Store, name: str, first: list[Beat], clock: Clock) -> None:
        self._store, self._name, self._clock = store, name, clock
        self.table = [(beat, clock.now()) for beat in first]
        self._missing = set(range(len(first)))
        self._busy_at = clock.now()

    def exchange(self, mine: Beat) -> None:
        """Tell ``mine``, and read the others.

        Raises:
            RuntimeError: the store is gone.
        """
        assert mine.place is not None
        self.put(f"beat/{mine.place.rank}", mine.written())
        self._missing = {rank for rank in self._missing if not self.has(f"beat/{rank}")}
        known = [rank for rank in range(len(self.table)) if rank not in self._missing]
        for rank, text in zip(
            known, self._store.multi_get([self._key(f"beat/{r}") for r in known]), strict=True
        ):
            beat = Beat.read(text)
            if beat.number != self.table[rank][0].number:
                self.table[rank] = (beat, self._clock.now())

    def silent_for(self, rank: int) -> float:
        """Seconds since ``rank`` told something new."""
        return max(0.0, self._clock.now() - self.table[rank][1])

    def idle(self, rank: int) -> float:
        """Seconds for which the training of ``rank`` has not moved."""
        return self.table[rank][0].idle + self.silent_for(rank)

    def is_busy(self, but: int | None = None) -> bool:
        """Whether a rank (other than ``but``) is about something that may take long, for no longer than it may."""
        return any(
            beat.patient and not beat.left and rank != but and self.idle(rank) <= beat.limit
            for rank, (beat, _) in enumerate(self.table)
        )

    def overdue(self) -> set[tuple[int, int]]:
        """Ranks that have not moved for longer than they may, each with the number of its last mark.

        All may wait for the slowest of them, so the largest limit counts. While a rank is about something that may take
        long, the others have nothing to do but to wait, and that time is not theirs.
        """
        now = self._clock.now()
        if self.is_busy():
            self._busy_at = now
            return set()
        longest = max(
            (beat.limit for beat, _ in self.table if not beat.patient and not beat.left), default=0.0
        )
        return {
            (rank, beat.marks)
            for rank, (beat, _) in enumerate(self.table)
            if not beat.left
            and self.idle(rank) > max(beat.limit, longest)
            and (beat.patient or now - self._busy_at > longest)
        }

    def put(self, key: str, text: str) -> None:
        """Keep ``text`` for all ranks."""
        self._store.set(self._key(key), text)

    def has(self, key: str) -> bool:
        """Whether some rank put it there."""
        return self._store.check([self._key(key)])

    def get(self, key: str) -> Any:
        """JSON that some rank put there."""
        return json.loads(self._store.get(self._key(key)))

    def claim(self, key: str) -> bool:
        """Whether this is the first rank that asks."""
        return self._store.add(self._key(key), 1) == 1

    def _key(self, key: str) -> str:
        return f"{self._name}/{key}"


def wait_for(found: Callable[[], bool], seconds: float) -> bool:
    """Ask ``found`` again and again, for as many seconds at most; the last answer."""
    until = time.monotonic() + seconds
    while not found():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _machine() -> str:
    """The running system and its namespace of process ids: containers on one host do not see one another."""
    if sys.platform != "linux":
        return socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no such files: processes of others are left alone
        return f"{socket.gethostname()} {os.getpid()}"
