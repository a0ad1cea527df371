"""What FSDP2 gathers of other ranks, and what of gradients is whole on its way to them, by the moment of a step.

    in a pass    the weights of the layer at work, and of the next one
    trained      besides, in what is computed with: embedding and head, from the first layer to the last backward; the
                 gradient of the head from the loss on. Gradients of the layer at work pass around it
                 (``ActivationSizes.layer_passing``); those of the layer before are being sent, in float32.
    at the end   gradients of embedding and head, in float32 to be sent; in what is computed with until they are copied,
                 that of the head, which FSDP2 does not let go of, until their shares are there

Seen in torch/distributed/fsdp/_fully_shard (2.11 to 2.13), and by what the CPU's allocator gave out
(tests/distributed/test_gathered_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.devices.peak_memory import Gathered

# The layer at work, and the next.
LAYERS = 2
# Bytes of a number of a gradient on its way to its share.
REDUCED = 4


def frozen_gathered(layer: int) -> Gathered:
    """What is gathered beside an adapter; ``layer``: bytes of the largest."""
    return Gathered(LAYERS * layer, LAYERS * layer, LAYERS * layer)


@dataclass(frozen=True)
class Trained:
    """What of a model is trained and shared out, in numbers.

    Attributes:
        layer: of the largest layer.
        ends: of what is in no layer: embedding, final norm and head.
        head: of the head, or of the embedding that it is.
        is_tied: whether it is.
    """

    layer: int
    ends: int
    head: int
    is_tied: bool


def trained_gathered(numbers: Trained, size: int, ranks: int, kept: tuple[int, int]) -> Gathered:
    """What is gathered and reduced in full fine-tuning.

    Args:
        numbers: of what is trained.
        size: bytes of a number that is computed with.
        ranks: that share one copy.
        kept: bytes that the first layer, and the last, keeps for its backward.
    """
    layer, ends = numbers.layer * size, numbers.ends * size
    sent, share = numbers.layer * REDUCED, numbers.layer * REDUCED // ranks
    beside = ends + numbers.head * size
    last_grad = 0 if numbers.is_tied else numbers.head * size
    return Gathered(
        head=layer + ends,
        # What the last layer sends is there in the backward of the one before, which has less to keep.
        last=beside + LAYERS * layer + max(0, sent - kept[1]),
        # Its own share of gradients is not there yet. The second layer's backward has one more to gather and to keep.
        first=beside + layer + sent - share + max(0, layer + kept[0] - share),
        ends=numbers.ends * REDUCED + max(ends, last_grad + numbers.ends * REDUCED // ranks),
    )
