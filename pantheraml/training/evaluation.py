"""Evaluation figures that are means over tokens, not means over batch means."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pantheraml.distributed.process_group import gather_objects


@dataclass
class TokenSums:
    """Sums over the label tokens of one evaluation.

    Attributes:
        loss: sum of negative log-likelihoods, in nats.
        correct: number of tokens predicted right.
        tokens: number of label tokens.
    """

    loss: float = 0.0
    correct: float = 0.0
    tokens: int = 0

    def add(self, mean_loss: float, accuracy: float, tokens: int) -> None:
        """Count one batch, given its means over ``tokens`` label tokens."""
        self.loss += mean_loss * tokens
        self.correct += accuracy * tokens
        self.tokens += tokens

    def of_all_ranks(self) -> TokenSums:
        """These sums and those of the other ranks."""
        found = gather_objects(self)
        return TokenSums(
            sum(one.loss for one in found),
            sum(one.correct for one in found),
            sum(one.tokens for one in found),
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """``{prefix}_loss`` (nats per token), ``{prefix}_perplexity`` and ``{prefix}_mean_token_accuracy``."""
        if not self.tokens:
            return {}
        mean = self.loss / self.tokens
        return {
            f"{prefix}_loss": mean,
            f"{prefix}_perplexity": math.exp(mean) if mean < 700 else math.inf,
            f"{prefix}_mean_token_accuracy": self.correct / self.tokens,
        }
