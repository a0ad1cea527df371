"""A question to every rank that any one of them may ask, alone: the others answer from a thread.

``if is_main_process(): trainer.print_memory_stats()`` is what people write, and a collective would wait for ever there.
Questions and answers go through the run's store, which a thread asks ten times a second.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

# How often the thread looks for a question.
_SECONDS = 0.1


class Question:
    """One question, with the answer of this rank.

    Args:
        name: the same on all ranks, and of this question alone.
        answer: gives this rank's, as JSON can carry it; called from a thread, and once more when the process ends.
        connect: opens a connection to the store; the thread has one of its own.
        rank: this one.
        world_size: number of ranks.
    """

    def __init__(
        self, name: str, answer: Callable[[], Any], connect: Callable[[], Store], rank: int, world_size: int
    ) -> None:
        self._name, self._answer, self._connect = name, answer, connect
        self._rank, self._world_size = rank, world_size
        self._store, self._over = connect(), threading.Event()
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._listen, name=f"pantheraml-{name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def ask(self, seconds: float = 10.0) -> list[Any]:
        """The answers by rank: of a rank that has ended its last one, None of one that gave none in time."""
        turn = self._store.add(f"{self._name}/asked", 1)
        self._store.set(f"{self._name}/{turn}", "")
        return [self._answer_of(rank, turn, seconds) for rank in range(self._world_size)]

    def close(self) -> None:
        """Leave the last answer for those who ask later, and end the thread."""
        atexit.unregister(self.close)
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        try:
            self._store.set(f"{self._name}/last/{self._rank}", json.dumps(self._answer()))
        except RuntimeError:  # the store is gone: nobody asks
            return

    def _answer_of(self, rank: int, turn: int, seconds: float) -> Any:
        key, last = f"{self._name}/{turn}/{rank}", f"{self._name}/last/{rank}"
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for found in (key, last):
                if self._store.check([found]):
                    return json.loads(self._store.get(found))
            time.sleep(0.01)
        return None

    def _listen(self) -> None:
        if self._gpu is not None:  # a new thread begins on GPU 0, where asking for memory would take some
            torch.cuda.set_device(self._gpu)
        turn = 1
        try:
            store = self._connect()
            # A wait of the store's own that runs out prints warnings.
            while not self._over.wait(_SECONDS):
                while store.check([f"{self._name}/{turn}"]):
                    store.set(f"{self._name}/{turn}/{self._rank}", json.dumps(self._answer()))
                    turn += 1
        except RuntimeError:  # the store is gone: the run is over
            return
