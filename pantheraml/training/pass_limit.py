"""How many tokens go through the model in one pass, after what has been seen to run out of memory and what to fit."""

from __future__ import annotations

# More tokens than any pass has.
NO_LIMIT = 2**62


class PassLimit:
    """What is remembered of passes that were too long, and of those that were not.

    A pass of T tokens that runs out of memory lets it be T / 2 from then on, or as many as have gone through before, if
    that is more. So a run fails a few times at most, and what has always fitted is not cut.

    Attributes:
        most: tokens of one pass.
        proven: tokens of the longest pass that went through.
    """

    def __init__(self) -> None:
        self.most, self.proven = NO_LIMIT, 0

    def passed(self, tokens: int) -> None:
        """A step went through whose longest pass had ``tokens``."""
        self.proven = max(self.proven, tokens)

    def failed(self, tokens: int, proven: int) -> int:
        """The new limit after a pass of ``tokens`` that did not fit; others of up to ``proven`` did before."""
        self.proven = proven if proven < tokens else 0
        self.most = max(1, tokens // 2, self.proven)
        return self.most
