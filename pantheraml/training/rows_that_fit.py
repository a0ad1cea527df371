"""What is computed without gradients, and row by row: as many rows at a time as memory has room for.

A rank does so by itself, where nothing is exchanged with others until it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.errors import PantheraMLError
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.log import say
from pantheraml.training.pass_limit import PassLimit

Found = TypeVar("Found")


class RowsThatFit:
    """One kind of such work.

    Attributes:
        what: it is, as the subject of a sentence.

    Args:
        what: likewise.
    """

    def __init__(self, what: str) -> None:
        self.what, self._limit = what, PassLimit()

    def __call__(self, run: Callable[[int], Found], rows: int, tokens: int) -> Found | None:
        """What ``run(n)`` gives, which takes n rows at a time; None where not even one fits.

        Args:
            run: does all of the work, of which nothing is kept where it fails.
            rows: up to which it may take at a time.
            tokens: of a row.
        """
        while True:
            at_a_time = min(rows, max(1, self._limit.most // tokens))
            try:
                found = run(at_a_time)
            except RuntimeError as error:
                if isinstance(error, PantheraMLError) or not is_out_of_memory(error):
                    raise
            else:
                self._limit.passed(at_a_time * tokens)
                return found
            clear_gpu_cache()
            if at_a_time == 1:
                return None
            most = self._limit.failed(at_a_time * tokens, self._limit.proven)
            say(
                f"{self.what} ran out of memory with {at_a_time} rows at a time; it goes on with up to "
                f"{max(1, most // tokens)}."
            )
