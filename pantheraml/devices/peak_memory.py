"""The most that a GPU holds in a training step, and when: the one formula behind every prediction of memory.

What a step needs is not all there at once. Layers fill the activations one after the other, the head comes while all of
them are there, and each layer's backward frees its own before gradients are complete. So the peak is that of six
moments, and its parts are those of that moment: gradients that do not exist then are 0. Those of a head and an
embedding that are one weight are two until the last backward is done, when the one is added to the other.

``allocated`` is what ``torch.cuda.max_memory_allocated`` will say, ``reserved`` what has to fit on the card.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

# What a process takes on a GPU before its first tensor: CUDA's context and the kernels.
CONTEXT_BYTES = int(0.6 * 2**30)
# Of the activations and of what passes, what the allocator's gaps take beside them, in percent.
GAPS_PERCENT = 10
# cuBLAS's workspace on Hopper, which torch allocates; on older GPUs it is smaller.
WORKSPACE_BYTES = 32 * 2**20
# DDP reduces gradients of up to so many bytes at once, at the end: less would not hide behind the backward.
ONE_BUCKET_BYTES = 2**30
# An assumption, not measured: what NCCL takes for a communicator by itself, outside torch's allocator.
NCCL_BYTES = 256 * 2**20

ALLOCATED = (
    "weights",
    "buffers",
    "trainable",
    "gradients",
    "optimizer",
    "activations",
    "passing",
    "logits",
    "gathered",
    "workspace",
)
# With what torch's allocator does not hand out.
COMPONENTS = (*ALLOCATED, "slack", "driver")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU at its peak.

    Attributes:
        weights: frozen ones as they are stored, with scales, FP8 twins and the margins that hold LoRA.
        buffers: 4-bit weights unpacked, 16-bit copies that autocast makes of weights that are trained.
        trainable: what is trained: adapters, or masters.
        gradients: as far as they are there.
        optimizer: its moments.
        activations: what layers keep for the backward.
        passing: what comes and goes around one layer.
        logits: what comes and goes around head and loss.
        gathered: weights of other ranks, and gradients on their way to them.
        workspace: of cuBLAS.
        slack: gaps of the allocator.
        driver: CUDA's own, and NCCL's.
        moment: when it is.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int = 0
    trainable: int = 0
    passing: int = 0
    logits: int = 0
    gathered: int = 0
    workspace: int = 0
    slack: int = 0
    driver: int = 0
    moment: str = ""

    @property
    def total(self) -> int:
        """What torch's allocator hands out."""
        return sum(getattr(self, name) for name in ALLOCATED)

    allocated = total

    @property
    def reserved(self) -> int:
        """What has to fit on the card."""
        return self.total + self.slack + self.driver

    def parts(self) -> dict[str, int]:
        """Bytes by name, those of ``reserved``, without what is 0."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}
        return {name: sizes[name] for name in COMPONENTS if sizes[name]}


class Gathered(NamedTuple):
    """Bytes of weights of other ranks, and of gradients that are whole on their way to them, by the moment.

    Attributes:
        head: at head and loss.
        last: in the last layer, whose backward is the first.
        first: in the backward of the first layer, or the second, beside the gradients of all layers.
        ends: while gradients of embedding and head are reduced, behind all backwards.
        step: in the optimizer's step.
    """

    head: int = 0
    last: int = 0
    first: int = 0
    ends: int = 0
    step: int = 0


NOTHING = Gathered()


class Outliving(NamedTuple):
    """Gradients that are there before a backward.

    Attributes:
        buckets: whether DDP's are, or ZeRO's.
        sums: whether those of other micro-batches are, beside buckets, which get them in the last one.
        late: whether buckets get them when all backwards are done, not one after the other.
    """

    buckets: bool = False
    sums: bool = False
    late: bool = False

    @property
    def before(self) -> int:
        """How often all gradients are there before a backward."""
        return self.buckets + self.sums

    @property
    def after(self) -> int:
        """How often they are there when layers are done."""
        return self.buckets + (self.sums or self.late or not self.buckets)

    @property
    def is_beside(self) -> bool:
        """Whether what a backward makes lies beside them until it is added or copied."""
        return self.sums or (self.buckets and not self.late)


class EndGradients(NamedTuple):
    """Bytes of the gradients of a trained head and embedding, where ranks do not share them out as they come.

    Attributes:
        head: which is among ``StepSizes.logits``, too.
        embedding: of tokens.
        is_tied: whether both are of one weight.
    """

    head: int = 0
    embedding: int = 0
    is_tied: bool = False


NONE_OUTLIVES = Outliving()
NO_ENDS = EndGradients()


@dataclass(frozen=True)
class StepSizes:
    """Bytes of what a step of one GPU is made of; see ``MemoryEstimate`` for the first.

    Attributes:
        outliving: which gradients outlive a backward.
        kept: what all layers keep.
        kept_first: the first layer's share of that, which is there at its backward.
        passing: around the last layer, first in the backward; one that recomputes may take more in its forward.
        passing_first: of the first one.
        logits: of head and loss; 0 where the head is elsewhere.
        forward_logits: of that, what the forward of a trained head takes.
        casts: 16-bit copies of trained weights that layers keep, which recompute none.
        casts_left: of those, what the backward of the last layer holds: its own in any case.
        forward_casts: those of all layers, until the forward is over.
        ends: gradients of a trained head and embedding.
        gathered: by the moment.
        late_gradients: of ``gradients``, those of embedding and head, if they come behind all backwards.
        workspace: as in ``MemoryEstimate``.
        driver: as in ``MemoryEstimate``.
    """

    weights: int
    buffers: int
    trainable: int
    gradients: int
    optimizer: int
    outliving: Outliving
    kept: int
    kept_first: int
    passing: int
    passing_first: int
    logits: int
    forward_logits: int = 0
    casts: int = 0
    casts_left: int = 0
    forward_casts: int = 0
    ends: EndGradients = NO_ENDS
    gathered: Gathered = NOTHING
    late_gradients: int = 0
    workspace: int = WORKSPACE_BYTES
    driver: int = CONTEXT_BYTES


def peak_memory(step: StepSizes) -> MemoryEstimate:
    """The fullest of the moments of ``step``."""
    gathered, outliving = step.gathered, step.outliving
    before = outliving.before * step.gradients
    after = outliving.after * step.gradients - (0 if outliving.before else step.late_gradients)
    ends, beside = step.ends, outliving.is_beside
    # Of one weight with the embedding the head's gradient waits for the last backward.
    waiting = ends.head if beside and ends.is_tied else 0
    early = ends.head if ends.is_tied or not beside else 0
    last = waiting + (ends.embedding if beside or ends.is_tied else 0)
    moments = (
        _at(step, "head and loss", before, step.kept, casts=step.forward_casts, logits=step.forward_logits,
            gathered=gathered.head),
        _at(step, "head and loss", before, step.kept, casts=step.casts, logits=step.logits, gathered=gathered.head),
        _at(step, "the last layer", before + early, step.kept, casts=step.casts_left, passing=step.passing,
            gathered=gathered.last),
        _at(step, "the backward of the first layer", after + waiting, step.kept_first, passing=step.passing_first,
            gathered=gathered.first),
        _at(step, "the gradient of the embedding", after + last, 0),
        _at(step, "the optimizer's step", step.gradients, 0, gathered=gathered.step),
        _at(step, "the reduction of embedding and head", after, 0, gathered=gathered.ends),
    )  # fmt: skip
    fullest = max(moments, key=lambda one: one.total)
    # Another moment may have fewer bytes and more gaps; the card has to hold the most of both.
    slack = max(one.reserved for one in moments) - fullest.total - fullest.driver
    return replace(fullest, slack=slack)


def _at(
    step: StepSizes,
    moment: str,
    gradients: int,
    kept: int,
    *,
    casts: int = 0,
    passing: int = 0,
    logits: int = 0,
    gathered: int = 0,
) -> MemoryEstimate:
    return MemoryEstimate(
        weights=step.weights,
        buffers=step.buffers + casts,
        trainable=step.trainable,
        gradients=gradients,
        optimizer=step.optimizer,
        activations=kept,
        passing=passing,
        logits=logits,
        gathered=gathered,
        workspace=step.workspace,
        slack=gaps(kept + passing + logits + gathered),
        driver=step.driver,
        moment=moment,
    )


def gaps(activations: int) -> int:
    """Bytes of the allocator's gaps beside ``activations`` bytes."""
    return activations * GAPS_PERCENT // 100
