"""A moment at which all ranks do the same, although one of them alone was asked to.

Ranks do the same things in the same order, but one may be some steps ahead of another, and a step in which only some
take part never ends. So each counts the moments at which it could do what is asked. When one rank has a wish, a thread
of each promises in the run's store not to go past its next moment before all have promised, and the last of those
moments is it. What a rank waits for then is threads, never the work of another rank; and a run in which nobody wishes
anything looks at one key of the store now and then, beside the training.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

# Seconds after which a rank that does not promise is taken for dead; the others go on, and find out.
_LONGEST_WAIT = 60.0


class Agreement:
    """Wishes of single ranks that all of them fulfil at the same moment.

    The run's own thread calls ``passed`` and ``close``; one other thread calls ``wish``, and ``turn`` again and again.

    Args:
        name: the same on all ranks, and of this agreement alone.
        connect: opens a connection to the store; None where there is one rank, whose wishes hold at its next moment.
        rank: this one.
        world_size: number of ranks.
    """

    def __init__(
        self, name: str, connect: Callable[[], Store] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self._name, self._rank, self._world_size = name, rank, world_size
        self._store = None if connect is None else connect()
        self._changed = threading.Condition()
        self._moment = self._round = 0
        self._wish: str | None = None  # of this rank
        self._known: str | None = None  # of the round, which is the first one of any rank
        self._promised: int | None = None
        self._agreed: float | None = None

    @property
    def known(self) -> str | None:
        """What will be done at a moment to come."""
        return self._wish if self._store is None else self._known

    def wish(self, wish: str) -> None:
        """What all ranks are to do; it stays this rank's wish until all do it."""
        with self._changed:
            self._wish = wish

    def turn(self) -> bool:
        """Exchange wishes and promises with the other ranks.

        Returns:
            Whether a promise of another rank is missing still.

        Raises:
            RuntimeError: the store is gone.
        """
        if self._store is None:
            return False
        with self._changed:  # a round does not end before this thread has seen that all agree
            key, wish = f"{self._name}/{self._round}", self._wish
            promised, agreed = self._promised, self._agreed
        if promised is None:
            if wish is not None:
                self._store.compare_set(f"{key}/wish", "", wish)
            if not self._store.check([f"{key}/wish"]):
                return False
            known = self._store.get(f"{key}/wish").decode()
            with self._changed:
                self._known, self._promised = known, self._moment + 1
                promised = self._promised
            self._store.set(f"{key}/{self._rank}", str(promised))
        if agreed is None:
            promises = [self._promise(key, rank) for rank in range(self._world_size)]
            if None in promises:
                return True
            self._agree(max(promise for promise in promises if promise is not None))
        return False

    def passed(self) -> str | None:
        """One more moment, which comes on all ranks; what all of them do now, or None."""
        with self._changed:
            self._moment += 1
            if self._store is not None:
                if self._promised is None or self._moment < self._promised:
                    return None
                if not self._changed.wait_for(lambda: self._agreed is not None, _LONGEST_WAIT):
                    self._agreed = math.inf
                if self._agreed != self._moment:
                    return None
                self._round += 1
            known, self._known, self._promised, self._agreed = self.known, None, None, None
            if self._wish == known:
                self._wish = None
            return known

    def give_up(self) -> None:
        """The store is gone: nobody is waited for, and no wish comes true."""
        self._agree(math.inf)

    def close(self) -> None:
        """No moment comes on this rank any more; wishes of others that are not agreed upon come too late."""
        if self._store is None:
            return
        try:
            self._store.set(f"{self._name}/over/{self._rank}", "")
        except RuntimeError:  # the store is gone: nobody asks
            return

    def _promise(self, key: str, rank: int) -> float | None:
        """The next moment of a rank, infinity for one that has none, None if it has not said so yet."""
        assert self._store is not None
        is_over = self._store.check([f"{self._name}/over/{rank}"])  # first: it may have promised before that
        if self._store.check([f"{key}/{rank}"]):
            return int(self._store.get(f"{key}/{rank}"))
        return math.inf if is_over else None

    def _agree(self, moment: float) -> None:
        with self._changed:
            self._agreed = moment
            self._changed.notify_all()
