"""Which tokens a forward is of: what masks of dropout follow from (``sample_dropout``, ``dropout_calls``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

_WORD = 2**64 - 1


class TokenKeys(NamedTuple):
    """The tokens of a forward, and of its backward.

    Attributes:
        keys: (T,) int64, contiguous: of each token, in the order of the flattened batch: sample << 32 | place in it.
        seed: of the step.
        rows: of the batch; T is rows x tokens of a row.
        inside: whether dropout of the model's own follows them, beside that of adapters.
    """

    keys: Tensor
    seed: int
    rows: int = 1
    inside: bool = False

    def seed_of(self, number: int) -> int:
        """The seed of adapter ``number``; odd and above 2^62, see ``draw_seeds``."""
        return 2**62 | mixed(self.seed, number) >> 2 | 1


# Of the forward that runs now; autograd's threads, which compute layers again, see it too.
_current: TokenKeys | None = None


def current_keys(tokens: int | None = None) -> TokenKeys | None:
    """The keys of the forward that runs now, if there are any, and as many as ``tokens`` where that is given."""
    return None if _current is None or tokens not in (None, _current.keys.numel()) else _current


@contextmanager
def current(keys: TokenKeys | None) -> Iterator[None]:
    """A block in which ``current_keys`` are these."""
    global _current  # noqa: PLW0603
    before, _current = _current, keys
    try:
        yield
    finally:
        _current = before


def mixed(*numbers: int) -> int:
    """64 bits that differ for different numbers (splitmix64's finish, Steele et al. 2014, of each in turn)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state
