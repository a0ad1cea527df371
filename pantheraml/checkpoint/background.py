"""One thing at a time that is done beside the training; how it ended is told to whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """A thread for work that is large and needs nobody, such as writing a checkpoint.

    The process ends when the work has ended.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None], *, beside: bool) -> None:
        """Do ``work`` in the thread, or here and now; what it raises waits for ``failure``.

        Args:
            work: to be done; the one before has ended.
            beside: in the thread.
        """
        if beside:
            self._pool = self._pool or ThreadPoolExecutor(1, "pantheraml-save")
            self._work = self._pool.submit(work)
            return
        done: Future[None] = Future()
        try:
            work()
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        self._work = done

    def failure(self) -> BaseException | None:
        """Wait until the work has ended; why it failed, if it did and nobody was told yet."""
        work, self._work = self._work, None
        return None if work is None else work.exception()
