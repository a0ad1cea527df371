"""What a model is to the placement planner: bytes and time of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PartSizes:
    """One part of a model.

    Attributes:
        weights: bytes as held on the device.
        trained: bytes that training adds: the adapter, gradients, the optimizer's state.
        time: of a token through it, forward and backward; a decoder layer of average size takes 1.0.
    """

    weights: int
    trained: int
    time: float

    @property
    def held(self) -> int:
        """Bytes that stay on the device for the whole run."""
        return self.weights + self.trained


@dataclass(frozen=True)
class ModelParts:
    """A model, as far as its place matters.

    Attributes:
        embedding: of tokens, and what stands beside the language model.
        layers: decoder layers, in order.
        head: final norm and head.
        tied: whether the head is the embedding, so that both are on one device; ``head`` then is the norm alone in
            bytes, and the whole head in time.
        kept_per_token: bytes that a layer keeps for the backward of one token.
        kept_when_recomputing: the same for a layer that recomputes.
        layer_passing: tokens of a micro-batch -> bytes that come and go while one layer is computed.
        head_passing: the same for head and loss.
        is_4bit: whether weights are in 4 bits already, for advice.
    """

    embedding: PartSizes
    layers: tuple[PartSizes, ...]
    head: PartSizes
    tied: bool
    kept_per_token: int
    kept_when_recomputing: int
    layer_passing: Callable[[int], int]
    head_passing: Callable[[int], int]
    is_4bit: bool = False
