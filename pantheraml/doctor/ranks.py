"""Ranks for a check: one for each GPU, or two on the CPU where there are fewer than two GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def num_ranks(gpus: int) -> int:
    """How many ranks ``call_on_ranks`` starts on a machine with ``gpus`` GPUs."""
    return max(2, gpus)


def hide_a_single_gpu(gpus: int) -> None:
    """Let this process, and those that it starts, compute on the CPU if there are fewer than two GPUs."""
    if gpus < 2:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def call_on_ranks(function: Callable[..., T], *arguments: object, gpus: int) -> T:
    """What ``function(*arguments)`` returned on rank 0; the ranks talk to one another when it begins.

    Raises:
        Exception: what the function raised on the rank that failed first.
    """
    from pantheraml.distributed.notebook import notebook_launch

    hide_a_single_gpu(gpus)
    return notebook_launch(function, *arguments, num_processes=num_ranks(gpus))
