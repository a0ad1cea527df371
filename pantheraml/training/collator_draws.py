"""Random numbers that a data collator draws follow from the rows of its batch: the same whenever it makes that batch.

A worker draws others than the process, a run that goes on others than one that was not interrupted, and what a collator
takes in the process is missing elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """A block in which Python, numpy and torch (on the CPU) draw from ``seed``; afterwards as if it had not been.

    Args:
        seed: of 64 bits.
    """
    generator = torch.default_generator  # torch.manual_seed would seed GPUs, too
    before = random.getstate(), np.random.get_state(), generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        generator.set_state(before[2])
