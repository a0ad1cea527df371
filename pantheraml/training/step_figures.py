"""Figures of training steps that stay on the device until they are logged.

TRL reads entropy and accuracy back after every forward, and the host then waits for the device before it can launch
the backward. Here they are kept as tensors and read once per log line.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StepFigures:
    """Sums over the label tokens of each micro-batch since the last log line."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, entropy: Tensor, is_top1: Tensor, label_mask: Tensor, tokens: Tensor | int) -> None:
        """Note one micro-batch.

        Args:
            entropy: per position, nats; zero where there is no label.
            is_top1: per position, nonzero where the label is the most likely token.
            label_mask: per position, whether there is a label.
            tokens: number of tokens that are not padding.
        """
        figures = [entropy.detach().sum(), is_top1.sum(), label_mask.sum()]
        figures.append(torch.as_tensor(tokens, device=entropy.device))
        self._rows.append(torch.stack([figure.to(torch.float64) for figure in figures]))

    def take(self) -> tuple[list[float], list[float], int]:
        """Mean entropy and accuracy of each micro-batch, and the tokens of all; reading waits for the device."""
        if not self._rows:
            return [], [], 0
        rows = torch.stack(self._rows).tolist()
        self._rows.clear()
        entropies = [entropy / labels if labels else 0.0 for entropy, _, labels, _ in rows]
        accuracies = [correct / labels if labels else 0.0 for _, correct, labels, _ in rows]
        return entropies, accuracies, int(sum(tokens for *_, tokens in rows))
