"""Few different lengths of passes, so that libraries keep few plans and blocks of memory fit again.

cuBLAS keeps 2.8 KiB on the host, for good, for each shape of a product that it has chosen a kernel for, and a layer
with adapters has some twenty products (H200, CUDA 13.0). Rows of all lengths behind one another give nearly every step
a length of its own. So a pass is filled up to one of 32 lengths between a power of two and the next: by 1 token in 100
on average, and by 3 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

# Of a batch, beside its tensors: how many of its tokens fill it up.
FILLED = "filled_tokens"
_PER_DOUBLING = 32


def filled_length(tokens: int, most: int) -> int:
    """The next of the few lengths; ``tokens`` where that is more than ``most``."""
    step = max(1, 2 ** (tokens.bit_length() - 1) // _PER_DOUBLING)
    found = -(-tokens // step) * step
    return found if found <= most else tokens


def repeated_tokens(lengths: Sequence[int], count: int) -> list[slice]:
    """Tokens that fill up a row of documents when they are put behind it, a document each.

    The longest document is begun again: what is computed of it is there already, so nothing that overflows is new.

    Args:
        lengths: of the documents.
        count: tokens that are missing.
    """
    longest = max(lengths)
    start = list(accumulate(lengths, initial=0))[lengths.index(longest)]
    return [slice(start, start + min(longest, count - at)) for at in range(0, count, longest)]
