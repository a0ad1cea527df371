"""What a model is to the planners: bytes, numbers and time of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pantheraml.devices.activations import ActivationSizes

Storage = Literal["4bit", "8bit", "fp8", "plain"]

# Of the memory that is free beside FP8 weights, what their turned twins may take; else they are turned anew each time.
TURNED_SHARE = 1 / 8


@dataclass(frozen=True)
class PartSizes:
    """One part of a model.

    Attributes:
        weights: bytes as held on the device.
        trained: bytes that training adds: the adapter, gradients, the optimizer's state.
        time: of a token through it, forward and backward; a decoder layer of average size takes 1.0.
        numbers: of its weights, however they are held.
        trainable: numbers that are trained: those of the adapter, or all.
    """

    weights: int
    trained: int
    time: float
    numbers: int = 0
    trainable: int = 0

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
        activations: what the four above follow from; None for parts that were given by hand.
        storage: how frozen weights are held.
        full_finetuning: whether all weights are trained.
        trained_size: bytes of a trained number: 4 of an adapter and of masters, 2 of weights trained in 16 bits.
        used: numbers of an average layer that a token is multiplied by.
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
    activations: ActivationSizes | None = None
    storage: Storage = "plain"
    full_finetuning: bool = False
    trained_size: int = 4
    used: float = 0.0

    @property
    def all(self) -> tuple[PartSizes, ...]:
        """Every part."""
        return self.embedding, *self.layers, self.head

    def beside(self, layers: int, room: float, *, has_first: bool = True) -> int:
        """Bytes that fused computation adds to the weights of ``layers`` layers on a GPU: margins for LoRA, the buffers
        into which 4-bit weights are unpacked, and the turned twins of FP8 weights.

        Args:
            layers: how many there are.
            room: bytes of the GPU that may be taken; twins are kept where they are a small share of what is free.
            has_first: whether the model's first layer is among them.
        """
        sizes = self.activations
        if sizes is None or not sizes.is_fused:
            return 0
        unpacked = sizes.unpacked_bytes() if self.storage == "4bit" else 0
        return layers * sizes.margin_bytes(self.storage) + unpacked + self._turned(layers, room, has_first)

    def _turned(self, layers: int, room: float, has_first: bool) -> int:
        """Bytes of FP8 twins, by the rule of ``choose_turned`` (models/fp8.py): all but that of what reads the
        embedding, whose gradient nobody asks for. Where they are not kept, of the largest stack, which is turned anew.
        """
        sizes = self.activations
        if self.storage != "fp8" or sizes is None:
            return 0
        numbers, turned = layers * sum(one.rows * one.cols for one in sizes.stacks), sizes.turned_bytes()
        weights = sum(part.weights for part in (*self.layers[:layers], self.embedding, self.head))
        if numbers <= TURNED_SHARE * (room - weights):
            return layers * sum(turned) - turned[0] * has_first
        return max(turned)
