"""Cut a model's layers into stages for GPUs in a row: what a stage takes, and the best cuts.

The cuts are exact: dynamic programming over the layers at which stages begin. A stage with ``later`` stages behind it
holds up to ``later + 1`` micro-batches at once, because it begins as many before the first comes back (1F1B).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from pantheraml.devices.flight import in_flight
from pantheraml.devices.model_parts import ModelParts, PartSizes
from pantheraml.devices.peak_memory import CONTEXT_BYTES, GAPS_PERCENT, gaps

# Of a layer's time, what it takes more when it recomputes: all of its products but the last and the attention are
# computed a third time.
RECOMPUTE_TIME = 0.4


class Stage(NamedTuple):
    """What a stage takes.

    Attributes:
        time: of a token, recompute included.
        need: bytes at the peak.
        least: bytes at the peak if all layers recomputed.
        recomputing: how many layers recompute, as few as its limit asks for.
    """

    time: float
    need: int
    least: int
    recomputing: int


class Cut(NamedTuple):
    """A stage's place: the position of its GPU in the row, and its layers from ``start`` to before ``stop``."""

    gpu: int
    start: int
    stop: int


class StageSizes:
    """Sizes of the stages of one model.

    Args:
        parts: the model.
        tokens: of one micro-batch.
        micro_batches: of one step.
        may_recompute: whether layers may recompute where memory asks for it.
    """

    def __init__(
        self, parts: ModelParts, tokens: int, micro_batches: int, *, may_recompute: bool = True
    ) -> None:
        self.num_layers = len(parts.layers)
        self._parts = parts
        self._tokens = tokens
        self._micro_batches = micro_batches
        self._may_recompute = may_recompute
        self._held = list(accumulate((layer.held for layer in parts.layers), initial=0))
        self._time = list(accumulate((layer.time for layer in parts.layers), initial=0.0))
        self._recompute_time = RECOMPUTE_TIME * self._time[-1] / self.num_layers
        self._layer_passing = parts.layer_passing(tokens)
        self._head_passing = parts.head_passing(tokens)

    def ends(self, start: int, stop: int) -> list[PartSizes]:
        """Embedding and head, as far as they are in a stage of the layers from ``start`` to before ``stop``."""
        parts, is_last = self._parts, stop == self.num_layers
        has_embedding = is_last if parts.tied else start == 0
        return [parts.embedding] * has_embedding + [parts.head] * is_last

    def weights(self, start: int, stop: int) -> int:
        """Bytes of the weights of such a stage."""
        return sum(part.weights for part in (*self._parts.layers[start:stop], *self.ends(start, stop)))

    def stage(self, start: int, stop: int, later: int, limit: float) -> Stage | None:
        """The stage of the layers from ``start`` to before ``stop``.

        Args:
            start: its first layer.
            stop: the first layer of the next stage, or the number of layers.
            later: how many stages come behind it.
            limit: bytes it may take; infinity asks for what it takes without recompute.

        Returns:
            What it takes, or None if that is more than ``limit`` however much recomputes.
        """
        layers = stop - start
        held = CONTEXT_BYTES + self._held[stop] - self._held[start]
        held += self._parts.beside(layers, limit, has_first=start == 0)
        time = self._time[stop] - self._time[start]
        passing = self._layer_passing
        if start == 0 or stop == self.num_layers:
            for part in self.ends(start, stop):
                held += part.held
                time += part.time
            if stop == self.num_layers:
                passing = max(passing, self._head_passing)  # one after the other, beside all that is kept
        tokens = int(self._tokens * in_flight(later, later + 1, self._micro_batches))
        kept = layers * tokens * self._parts.kept_per_token
        saved = tokens * (self._parts.kept_per_token - self._parts.kept_when_recomputing)
        most = layers if self._may_recompute and saved > 0 else 0
        least = held + with_gaps(passing + kept - most * saved)
        if least > limit:
            return None
        need, recomputing = held + with_gaps(passing + kept), 0
        if need > limit:
            room = _without_gaps(int(limit) - held)
            recomputing = -(-(passing + kept - room) // saved)
            need = held + with_gaps(passing + kept - recomputing * saved)
            time += self._recompute_time * recomputing
        return Stage(time, need, least, recomputing)


def with_gaps(activations: int) -> int:
    """Bytes of activations with the allocator's gaps."""
    return activations + gaps(activations)


def _without_gaps(room: int) -> int:
    """The largest number of bytes that is at most ``room`` with its gaps."""
    return (100 * room + 99) // (100 + GAPS_PERCENT)


# Of a stage that begins and ends at two layers, with so many behind it, on the GPU at a position: what is to be small,
# and a bound below what any longer stage has; infinite where it cannot be.
Score = Callable[[int, int, int, int], tuple[float, float]]


class _Search:
    """The cuts whose worst stage has the smallest score."""

    def __init__(self, num_layers: int, num_gpus: int, score: Score) -> None:
        self._num_layers, self._num_gpus, self._score = num_layers, num_gpus, score
        self._known: dict[tuple[int, int, int], tuple[float, int]] = {}

    def worst(self, gpu: int, stages: int, start: int) -> float:
        """The worst score of the layers from ``start`` on as ``stages`` stages on the GPUs from ``gpu`` on."""
        return self._solve(gpu, stages, start)[0]

    def cuts(self, stages: int) -> list[Cut] | None:
        """The best cuts into exactly ``stages`` stages; None where there are none."""
        if math.isinf(self.worst(0, stages, 0)):
            return None
        found: list[Cut] = []
        gpu = start = 0
        while start < self._num_layers:
            stop = self._solve(gpu, stages - len(found), start)[1]
            if stop:
                found.append(Cut(gpu, start, stop))
                start = stop
            gpu += 1
        return found

    def _solve(self, gpu: int, stages: int, start: int) -> tuple[float, int]:
        """The worst score, and where the stage on ``gpu`` ends; 0 where that GPU stays empty."""
        if stages == 0:
            return (0.0 if start == self._num_layers else math.inf), 0
        key = gpu, stages, start
        if key not in self._known:
            self._known[key] = self._best(gpu, stages, start)
        return self._known[key]

    def _best(self, gpu: int, stages: int, start: int) -> tuple[float, int]:
        best, best_stop = math.inf, 0
        last = self._num_layers - (stages - 1)
        for stop in range(start + 1 if stages > 1 else last, last + 1):
            value, bound = self._score(start, stop, stages - 1, gpu)
            if bound >= best:
                break
            if value < best:
                value = max(value, self.worst(gpu + 1, stages - 1, stop))
            if value < best:
                best, best_stop = value, stop
        if self._num_gpus - gpu > stages:
            without = self.worst(gpu + 1, stages, start)
            if without < best:
                return without, 0
        return best, best_stop


def balanced_cuts(sizes: StageSizes, limits: list[int]) -> list[Cut] | None:
    """The stages whose slowest is as fast as possible; of such, those whose fullest GPU holds the fewest bytes.

    Args:
        sizes: of the stages.
        limits: bytes of each GPU, in the order of stages.

    Returns:
        A stage for every GPU, fewer only where limits or the number of layers allow no more; None if nothing fits.
    """

    def time(start: int, stop: int, later: int, gpu: int) -> tuple[float, float]:
        stage = sizes.stage(start, stop, later, limits[gpu])
        return (stage.time, stage.time) if stage else (math.inf, math.inf)

    def memory(start: int, stop: int, later: int, gpu: int) -> tuple[float, float]:
        stage = sizes.stage(start, stop, later, limits[gpu])
        return (stage.need, stage.least) if stage and stage.time <= slowest else (math.inf, math.inf)

    search = _Search(sizes.num_layers, len(limits), time)
    for stages in range(min(len(limits), sizes.num_layers), 0, -1):
        slowest = search.worst(0, stages, 0) * (1 + 1e-9)  # sums of the same times differ in their last bits
        if not math.isinf(slowest):
            return _Search(sizes.num_layers, len(limits), memory).cuts(stages)
    return None


def sequential_cuts(sizes: StageSizes, limits: list[int]) -> list[Cut] | None:
    """Stages on the first GPUs, each filled as far as its limit and the stages behind it allow.

    A GPU is left out only where its limit holds no layer.

    Args:
        sizes: of the stages.
        limits: bytes of each GPU, in the order of stages.
    """

    def fits(start: int, stop: int, later: int, gpu: int) -> tuple[float, float]:
        return (0.0, 0.0) if sizes.stage(start, stop, later, limits[gpu]) else (math.inf, math.inf)

    for used in range(1, len(limits) + 1):
        search = _Search(sizes.num_layers, used, fits)
        for stages in range(min(used, sizes.num_layers), 0, -1):
            if search.worst(0, stages, 0) == 0:
                return _filled(search, fits, sizes.num_layers, stages)
    return None


def _filled(search: _Search, fits: Score, num_layers: int, stages: int) -> list[Cut]:
    found: list[Cut] = []
    gpu = start = 0
    while start < num_layers:
        later = stages - len(found) - 1
        for stop in range(num_layers - later, start, -1):
            if fits(start, stop, later, gpu)[0] == 0 and search.worst(gpu + 1, later, stop) == 0:
                found.append(Cut(gpu, start, stop))
                start = stop
                break
        gpu += 1
    return found


def closest_cuts(sizes: StageSizes, limits: list[int]) -> list[Cut]:
    """For limits that nothing fits: a stage for every GPU (as far as there are layers), least above the limits."""

    def excess(start: int, stop: int, later: int, gpu: int) -> tuple[float, float]:
        stage = sizes.stage(start, stop, later, math.inf)
        assert stage is not None, "everything fits where there is no limit"
        above = stage.least - limits[gpu]
        return above, above

    stages = min(len(limits), sizes.num_layers)
    cuts = _Search(sizes.num_layers, len(limits), excess).cuts(stages)
    assert cuts is not None, "without limits every number of stages can be cut"
    return cuts
