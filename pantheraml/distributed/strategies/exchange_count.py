"""Where in a pass a rank is, by the exchanges that it has taken part in."""

from __future__ import annotations


class ExchangeCount:
    """The exchanges of a pass, counted; one that failed is gone through again, without those that others have seen."""

    def __init__(self) -> None:
        self._count = 0  # of the pass at hand
        self._done = 0  # of a pass that failed

    @property
    def is_new(self) -> bool:
        """Whether the others have not seen the next exchange yet."""
        return self._count >= self._done

    def begin(self) -> None:
        """A pass begins, or the one that failed does once more."""
        self._count = 0

    def add(self) -> None:
        """An exchange is done, or was left out."""
        self._count += 1

    def end(self) -> None:
        """The pass is over: the next one is a new one."""
        self._done = 0

    def failed(self) -> None:
        """The pass failed on this rank: what it has exchanged is remembered."""
        self._done = max(self._done, self._count)
