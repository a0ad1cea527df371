"""Memory that torch keeps of a GPU, once segments grow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# Blocks one after another, each a little longer than the one before, as rows of all lengths make them.
ROWS = """
import torch
from pantheraml.devices.segments import grow_segments

grow_segments(torch.device("cuda", 0))
for size in range(32, 96, 8):
    torch.empty(size << 20, dtype=torch.uint8, device="cuda")
print(torch.cuda.memory_reserved() >> 20, any(one["is_expandable"] for one in torch.cuda.memory_snapshot()))
"""


def reserved(**environment: str) -> tuple[int, bool]:
    """MiB that are reserved after ``ROWS`` in a process of its own, and whether any of it can grow."""
    inherited = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", ROWS], env=inherited | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, grows = done.stdout.split()
    return int(size), grows == "True"


def test_longer_blocks_take_the_place_of_shorter_ones():
    size, grows = reserved()
    assert grows
    assert size <= 88 + 40, "the longest block, in pieces of 20 MiB, and what is small"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_environment_says_is_left_alone(name):
    size, grows = reserved(**{name: "expandable_segments:False"})
    assert not grows
    assert size > 2 * 88, "each block has a segment of its own"
