"""What the ranks of a run tell one another while they train: a few words each, through the run's store.

Nobody waits here: a rank writes where it is and reads what the others wrote. How old that is, its own clock
tells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        host: name of its machine.
        pid: its process.
        thread: the one that trains, as ``threading.get_ident`` numbers it.
        stacks: file of its stacks, which are written when it can tell nothing itself.
    """

    host: str
    pid: int
    thread: int
    stacks: str


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    Attributes:
        place: where it runs; None before it has told anything.
        number: counts what it told.
        step: the step it is in.
        phase: what it does there.
        marks: how often its training thread said that it goes on.
        idle: seconds since it last moved.
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
    """The table of all ranks, as one of them sees it.

    Args:
        store: a connection of this table's own.
        name: of this table, the same on all ranks.
        rank: this one.
        first: what is known of each rank before it tells anything, by rank.
        clock: measures how old a word is.
    """

    def __init__(self, store: Store, name: str, rank: int, first: list[Beat], clock: Clock) -> None:
        self._store, self._name, self._clock, self.rank = store, name, clock, rank
        self.table = [(beat, clock.now()) for beat in first]
        self._missing = set(range(len(first)))
        self._busy_at = clock.now()

    def exchange(self, mine: Beat) -> None:
        """Tell ``mine``, and read the others.

        Raises:
            RuntimeError: the store is gone.
        """
        self.put(f"beat/{self.rank}", mine.written())
        self._missing = {rank for rank in self._missing if not self.has(f"beat/{rank}")}
        known = [rank for rank in range(len(self.table)) if rank not in self._missing]
        told = self._store.multi_get([self._key(f"beat/{rank}") for rank in known])
        for rank, text in zip(known, told, strict=True):
            beat = Beat.read(text)
            if beat.number != self.table[rank][0].number:
                self.table[rank] = (beat, self._clock.now())

    def silent_for(self, rank: int) -> float:
        """Seconds since ``rank`` told something new."""
        return max(0.0, self._clock.now() - self.table[rank][1])

    def idle(self, rank: int) -> float:
        """Seconds for which the training of ``rank`` has not moved."""
        return self.table[rank][0].idle + self.silent_for(rank)

    def living(self, silence: float) -> list[int]:
        """Ranks that train and were heard of within ``silence`` seconds, this one included."""
        return [
            rank
            for rank, (beat, _) in enumerate(self.table)
            if rank == self.rank or (beat.place and not beat.left and self.silent_for(rank) <= silence)
        ]

    def overdue(self) -> set[tuple[int, int]]:
        """Ranks that have not moved for longer than they may, each with the number of its last mark.

        All may wait for the slowest of them, so the largest limit counts. While a rank is about something that may take
        long, the others have nothing to do but to wait, and that time is not theirs.
        """
        now = self._clock.now()
        beats = [(rank, beat) for rank, (beat, _) in enumerate(self.table) if not beat.left]
        if any(beat.patient and self.idle(rank) <= beat.limit for rank, beat in beats):
            self._busy_at = now
            return set()
        longest = max((beat.limit for _, beat in beats if not beat.patient), default=0.0)
        return {
            (rank, beat.marks)
            for rank, beat in beats
            if self.idle(rank) > max(beat.limit, longest) and (beat.patient or now - self._busy_at > longest)
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
