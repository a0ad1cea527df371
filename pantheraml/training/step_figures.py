"""Figures of training steps that stay on the device until they are logged.

TRL reads entropy and accuracy back after every forward, and the host then waits for the device before it can launch
the backward. Here they are kept as tensors and read once per log line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pantheraml.distributed.process_group import is_distributed_available

_TOKENS = 3  # their place among the sums


class Figures(NamedTuple):
    """Means over the label tokens of some steps, of all ranks, and their tokens.

    Attributes:
        entropy: in nats.
        accuracy: share of label tokens that were the most likely ones.
        tokens: that are not padding.
        balance: the loss of the routers of a mixture of experts, the mean over micro-batches; None without one.
    """

    entropy: float
    accuracy: float
    tokens: int
    balance: float | None = None


class StepFigures:
    """Sums over the label tokens of each micro-batch since the last log line."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(
        self,
        log_probs: Tensor,
        entropy: Tensor,
        is_top1: Tensor,
        label_mask: Tensor,
        tokens: Tensor | int,
        balance: Tensor | None = None,
    ) -> None:
        """Note one micro-batch, or several that went through the model together.

        Args:
            log_probs: per position, of the label; not finite where the micro-batch is not.
            entropy: per position, nats; zero where there is no label.
            is_top1: per position, nonzero where the label is the most likely token.
            label_mask: per position, whether there is a label.
            tokens: number of tokens that are not padding.
            balance: the routers' losses of those that have labels, summed, and how many these are: (2,).
        """
        # Kernels that keep an entropy above zero make zero of what is no number.
        told = torch.add(entropy.detach().sum(), log_probs.detach().sum(), alpha=0)
        figures = [told, is_top1.sum(), label_mask.sum()]
        figures.append(torch.as_tensor(tokens, device=entropy.device))
        if balance is not None:
            figures += list(balance.detach())
        self._rows.append(torch.stack([figure.to(torch.float64) for figure in figures]))

    @property
    def count(self) -> int:
        """Passes noted since the last time they were taken."""
        return len(self._rows)

    def forget(self, count: int) -> None:
        """Forget all but the first ``count`` passes: the others are repeated."""
        del self._rows[count:]

    def waiting_tokens(self) -> int:
        """Tokens of all ranks since the last time; reading waits for the device and the other ranks."""
        if not self._rows:
            return 0
        tokens = torch.stack([row[3].to(self._rows[0].device) for row in self._rows]).sum()
        if is_distributed_available():
            dist.all_reduce(tokens)
        return int(tokens)

    def take(self) -> Figures | None:
        """The figures of all ranks since the last time, or None; reading waits for the device and the other ranks."""
        if not self._rows:
            return None
        rows = torch.stack([row.to(self._rows[0].device) for row in self._rows])
        # A micro-batch that is not finite has tokens, and no figures that could be part of a mean.
        sums = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0).sum(0)
        sums[_TOKENS] = rows[:, _TOKENS].sum()
        self._rows.clear()
        if is_distributed_available():
            dist.all_reduce(sums)
        entropy, correct, labels, tokens, *balance = sums.tolist()
        count = max(labels, 1)
        mean = balance[0] / max(balance[1], 1) if balance else None
        return Figures(entropy / count, correct / count, int(tokens), mean)
