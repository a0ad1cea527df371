"""What DeepSpeed's ZeRO holds of what is trained, and what comes and goes around its gradients, by stage and moment.

    stage   trained weights   gradients   masters   moments      of each number, with weights in float32
    0       4                 4           -         8
    1       4                 4           4 / n     8 / n        a master of what this rank steps, beside the weights
    2       4                 4 / n       4 / n     8 / n
    3       4 / n             4 / n       -         8 / n        the share itself is stepped, gradients stay for good

    bucket      gradients on their way, allocated whole however little is trained: at stages 1 and 2 for each backward,
                at stage 3 for good; what is summed over ranks is copied beside it, unless it is one piece
    large ones  a gradient that no bucket holds (embedding and head) stays where the backward made it
    the step    gradients once more in one piece; norms in float64, a weight at a time

Gradients that wait for the end of a step (``waits_whole``) are whole until then, at stage 2, too, and the bucket comes
only then. Where it holds all of them, as it does an adapter's, that takes no more than a bucket for each backward.

Where settings of DeepSpeed make weights 16-bit ones, they take 2 bytes where 4 is written above, with masters at every
stage (Rajbhandari et al. 2020, "ZeRO": 2 + 2 + 12). Read in DeepSpeed 0.19.8 (``stage_1_and_2.py``, ``stage3.py``), and
seen in what the CPU's allocator gave out (tests/distributed/test_deepspeed_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.devices.optimizer_states import moment_bytes
from pantheraml.devices.peak_memory import Gathered, Outliving

# Gradients that are reduced at a time, where nobody says otherwise: 200 MB of them, more of which are no faster. The
# default of DeepSpeed is ten times that.
BUCKET = 50_000_000
# DeepSpeed's own: numbers that stay gathered at stage 3, and that are fetched before they are needed.
LIVE, PREFETCH = 1_000_000_000, 50_000_000
# At stage 0 DeepSpeed copies as many at a time, whatever its settings say.
_STAGE_0_BUCKET = 500_000_000
# Bytes of a number of masters, and of norms.
_MASTER, _NORM = 4, 8


def bucket_of(trained: int) -> int:
    """Numbers of the bucket where nobody says otherwise: DeepSpeed allocates it whole, however little is trained."""
    return max(1, min(BUCKET, trained))


def waits_whole(stage: int, trained: int, bucket: int, *, overlaps: bool = False) -> bool:
    """Whether gradients wait, whole on each rank, for the end of a step: where they are so anyway, or one bucket has
    room for them.

    Args:
        stage: of ZeRO.
        trained: numbers.
        bucket: numbers that are reduced at a time.
        overlaps: a backward is to hide reductions.
    """
    return stage < 3 and (trained <= bucket or stage == 0 or (stage == 1 and not overlaps))


@dataclass(frozen=True)
class Zero:
    """Settings of DeepSpeed, as far as memory follows from them.

    Attributes:
        stage: of ZeRO.
        ranks: that share one copy.
        bucket: numbers of gradients that are reduced at a time.
        live: numbers of weights that stay gathered at stage 3.
        prefetch: of these, numbers that come at a time, in one piece from which each is copied.
        size: bytes of a number of a trained weight.
        buffers: how many buckets there are at stages 1 and 2.
        offload: masters and moments, and the gradients that belong to them, are in host memory.
        waits: gradients wait, whole, for the end of a step, see ``waits_whole``.
    """

    stage: int
    ranks: int
    bucket: int
    live: int = LIVE
    prefetch: int = PREFETCH
    size: int = _MASTER
    buffers: int = 1
    offload: bool = False
    waits: bool = False

    @property
    def cuts(self) -> bool:
        """Whether a pass leaves a share of its gradients on each rank."""
        return self.stage >= 2 and not self.waits

    def outliving(self, *, sums: bool) -> Outliving:
        """Which gradients outlive a backward; ``sums``: a step has several passes."""
        return Outliving(buckets=self.stage == 3 or sums)

    def late(self, gradients: int) -> int:
        """Of ``gradients`` of one backward, bytes that ``zero_gathered`` counts until the step."""
        return gradients if self.stage == 2 and self.cuts else 0


@dataclass(frozen=True)
class ZeroWeights:
    """The weights of a model, whole.

    Attributes:
        trained: numbers that are trained.
        head: of these, numbers of the head, or of the embedding that it is; the embedding has as many.
        is_tied: whether it is.
        layer: of these, numbers of the largest layer.
        numbers: of all weights.
        bytes: of all weights.
    """

    trained: int
    head: int
    is_tied: bool
    layer: int
    numbers: int
    bytes: int


def zero_states(zero: Zero, trained: int, optim: str) -> tuple[int, int, int]:
    """Bytes of trained weights, of gradients between passes and in the step, and of masters and moments.

    Args:
        zero: settings.
        trained: numbers.
        optim: transformers' name of the optimizer.
    """
    share, stage, size = -(-trained // zero.ranks), zero.stage, zero.size
    held = share if stage else trained
    masters = _MASTER if stage in (1, 2) or size < _MASTER else 0
    weights = size * (share if stage == 3 else trained)
    gradients = size * (share if zero.cuts else trained)
    states = held * (masters + moment_bytes(optim, _MASTER))
    if zero.offload:
        states, gradients = 0, 0 if zero.cuts else gradients
    return weights, gradients, states


def zero_gathered(zero: Zero, weights: ZeroWeights, kept: int) -> Gathered:
    """Bytes that come and go around gradients and gathered weights, by the moment; at stage 2 with the share of the
    gradients of this backward.

    Args:
        zero: settings.
        weights: of the model.
        kept: bytes that the last layer keeps for its backward, if they are gone when its first gradient comes: those of
            a fused layer, whose gradients come together.
    """
    if zero.stage == 0:
        return Gathered(ends=zero.size * min(_STAGE_0_BUCKET, weights.trained))
    if zero.stage == 3:
        return _gathered_weights(zero, weights, kept)
    size, share = zero.size, -(-weights.trained // zero.ranks)
    buckets = zero.buffers * zero.bucket * size
    # Of several buckets, few reach from the share of one rank into that of the next; one has all of them.
    is_one = weights.trained <= zero.bucket
    copied = size * weights.trained if is_one and zero.ranks > 1 else 0
    large = size * weights.head
    # A head that is the embedding has a gradient from the loss on, which waits for the embedding's.
    waiting = large * weights.is_tied
    # On the host, gradients go through room for the largest.
    apart = large if zero.offload else 0
    mine = 0 if zero.offload else size * share
    if not zero.cuts:
        # Whole gradients go into the bucket, out of what is counted as gradients.
        ends = max(buckets, copied, mine, large)
        if zero.waits:
            return Gathered(apart, apart, apart, apart + ends)
        return Gathered(apart, apart + max(0, buckets - kept), apart + buckets, apart + ends)
    # This backward's share comes with the first bucket that is full.
    early = mine if weights.layer > zero.bucket else 0
    later = 0 if is_one else mine
    return Gathered(
        head=apart,
        last=apart + waiting + max(0, buckets + early - kept),
        first=apart + buckets + waiting + later,
        ends=apart + buckets + max(later + large + waiting, copied, mine),
        step=apart + max(0 if zero.offload else share * _MASTER, _NORM * min(weights.head, share)),
    )


def _gathered_weights(zero: Zero, weights: ZeroWeights, kept: int) -> Gathered:
    """At stage 3: the bucket, which is always there, and weights that are gathered, which a small model keeps all."""
    size, share = zero.size, -(-weights.trained // zero.ranks)
    bucket = zero.bucket * size
    gathered = min(zero.live + zero.prefetch, weights.numbers) * weights.bytes // max(1, weights.numbers)
    copied = size * min(zero.bucket, weights.trained)
    large = size * weights.head
    waiting = large * weights.is_tied
    passing = bucket + gathered
    return Gathered(
        head=passing,
        last=passing + waiting + max(0, copied - kept),
        first=passing + copied + waiting,
        ends=passing + max(copied, large + waiting),
        step=bucket + (0 if zero.offload else share * _MASTER),
    )
