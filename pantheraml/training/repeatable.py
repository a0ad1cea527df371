"""Two runs of the same layout are equal bit by bit, where that was asked for.

Sums of floats depend on their order. torch has an order for whatever it computes, or refuses; backends of attention
that have none are passed over (``kernels/attention``), our own kernels add up in the order of their rows, and
micro-batches are not merged by how much memory happens to be free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pantheraml.errors import ConfigError
from pantheraml.training.continuing import ContinuedRun

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_IN_ORDER = (":4096:8", ":16:8")


def check_cublas(device: torch.device, variables: Mapping[str, str] = os.environ) -> None:
    """Refuse a GPU whose matrix products need not be repeatable.

    Args:
        device: of the run.
        variables: of the process.

    Raises:
        ConfigError: cuBLAS was not told to use workspaces of its own for each stream; torch looks once, at the first
            product of the process, so nobody can tell it later.
    """
    if device.type != "cuda" or variables.get(_CUBLAS) in _IN_ORDER:
        return
    raise ConfigError(
        got=f"deterministic=True was given, and {_CUBLAS} is {variables.get(_CUBLAS, 'not set')}.",
        need=f"Products of cuBLAS are repeatable with {' or '.join(_IN_ORDER)}, which is read when a process first "
        "multiplies.",
        fix=f"Type {_CUBLAS}={_IN_ORDER[0]} in front of the command.",
    )


@contextmanager
def in_fixed_order(on: bool) -> Iterator[None]:
    """Let torch, and what asks it, take what adds up in a fixed order within; nothing changes unless ``on``."""
    if not on:
        yield
        return
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn: Any = torch.backends.cudnn
    conv = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warns)
        cudnn.deterministic, cudnn.benchmark = conv


class RepeatableRun(ContinuedRun):
    """The part of the trainer that trains in a fixed order; ``deterministic`` of the arguments says whether."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "deterministic", False):
            check_cublas(self.args.device)

    @contextmanager
    def going_on(self, resume: str | bool | None) -> Iterator[None]:
        """As ``ContinuedRun``."""
        with in_fixed_order(getattr(self.args, "deterministic", False)), super().going_on(resume):
            yield
