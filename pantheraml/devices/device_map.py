"""Where the parts of a model go: the planner behind ``device_map`` and ``max_memory``. Pure functions, without torch.

Every GPU gets a run of layers, a stage; micro-batches are pipelined through the stages. The embedding stands before the
first layer and the head behind the last; where the head is the embedding, both are on the last stage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pantheraml.devices.flight import in_flight
from pantheraml.devices.model_parts import ModelParts, PartSizes
from pantheraml.devices.nvml import GIB
from pantheraml.devices.peak_memory import CONTEXT_BYTES
from pantheraml.devices.stage_split import (
    Cut,
    StageSizes,
    balanced_cuts,
    closest_cuts,
    sequential_cuts,
    with_gaps,
)
from pantheraml.errors import ConfigError

__all__ = ["Kind", "ModelParts", "PartSizes", "Placement", "describe", "fits", "interleaved", "place"]

Kind = Literal["auto", "balanced", "sequential"]

# How much slower the slowest GPU may get by a second round, which saves several times that.
_UNEVEN = 1.02


@dataclass(frozen=True)
class Placement:
    """Which GPU each part of a model is on.

    Attributes:
        embedding: index of its GPU.
        layers: index of the GPU of each layer; those of a GPU are neighbours, in one round or in each of several.
        head: index of the GPU of final norm and head.
        predicted: bytes of each GPU at its peak; empty where nobody counted.
        limits: bytes that were allowed of each GPU that could be used; empty where nobody counted.
        recomputing: how many layers of each GPU will recompute to keep its limit.
    """

    embedding: int
    layers: tuple[int, ...]
    head: int
    predicted: Mapping[int, int]
    limits: Mapping[int, int]
    recomputing: Mapping[int, int]

    @property
    def counts(self) -> dict[int, int]:
        """Number of layers of each GPU that has some, in the order of the first of them."""
        return dict(Counter(self.layers))

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs that are used, in the order in which a token passes through them."""
        return tuple(dict.fromkeys((*self.layers, self.head, self.embedding)))


def fits(parts: ModelParts, limit: int, tokens: int) -> bool:
    """Whether the whole model trains within ``limit`` bytes of one GPU, ``tokens`` at a time; recompute may help."""
    return StageSizes(parts, tokens, 1).stage(0, len(parts.layers), 0, limit) is not None


def place(
    kind: Kind, parts: ModelParts, limits: Mapping[int, int], *, tokens: int, micro_batches: int
) -> Placement:
    """A place for every part.

    Args:
        kind: ``"auto"``: the GPU with the largest limit if the whole model fits there, else as ``"balanced"``;
            ``"balanced"``: stages whose slowest is as fast as possible, on all GPUs; ``"sequential"``: each GPU is
            filled up to its limit before the next one is used.
        parts: the model.
        limits: bytes that may be taken of each GPU, in the order in which tokens are to pass through them.
        tokens: of one micro-batch, padding included.
        micro_batches: of one step.

    Raises:
        ConfigError: the model does not fit.
    """
    gpus, sizes = list(limits), StageSizes(parts, tokens, micro_batches)
    bounds = [limits[gpu] for gpu in gpus]
    if kind == "auto" and gpus and fits(parts, max(bounds), tokens):
        cuts = [Cut(bounds.index(max(bounds)), 0, sizes.num_layers)]
    elif kind == "sequential":
        cuts = sequential_cuts(StageSizes(parts, tokens, micro_batches, may_recompute=False), bounds)
        cuts = cuts or sequential_cuts(sizes, bounds)
    else:
        cuts = balanced_cuts(sizes, bounds)
    if not cuts:
        raise _too_small(parts, sizes, limits, tokens)
    return _placed(sizes, cuts, limits, tied=parts.tied)


def _placed(sizes: StageSizes, cuts: list[Cut], limits: Mapping[int, int], *, tied: bool) -> Placement:
    gpus = list(limits)
    layers: list[int] = []
    predicted: dict[int, int] = {}
    recomputing: dict[int, int] = {}
    for number, (position, start, stop) in enumerate(cuts):
        gpu = gpus[position]
        stage = sizes.stage(start, stop, len(cuts) - 1 - number, limits[gpu])
        assert stage is not None, "cuts keep the limits"
        layers += [gpu] * (stop - start)
        predicted[gpu], recomputing[gpu] = stage.need, stage.recomputing
    embedding = layers[-1] if tied else layers[0]
    return Placement(embedding, tuple(layers), layers[-1], predicted, dict(limits), recomputing)


def interleaved(
    placement: Placement, parts: ModelParts, *, tokens: int, micro_batches: int
) -> Placement | None:
    """``placement`` in two rounds: each GPU has a run of layers in the first half of the model and one in the second.

    GPUs then wait half as long for the first and the last micro-batch, and hold more activations.

    Returns:
        The placement, or None where the limits do not allow it without recompute, a GPU has one layer only, or layers
        are so different that the slowest GPU would be slower.
    """
    counts, gpus = placement.counts, list(placement.counts)
    if len(gpus) < 2 or min(counts.values()) < 2 or any(placement.recomputing.values()):
        return None
    halves = [-(-counts[gpu] // 2) for gpu in gpus], [counts[gpu] // 2 for gpu in gpus]
    layers = tuple(
        gpu for half in halves for gpu, count in zip(gpus, half, strict=True) for _ in range(count)
    )
    found = replace(placement, layers=layers)
    predicted: dict[int, int] = {}
    for position, gpu in enumerate(gpus):
        held = sum(part.held for part in _parts_of(found, parts, gpu))
        flight = in_flight(len(gpus) - 1 - position, len(gpus), micro_batches, rounds=2)
        kept = int(counts[gpu] * tokens * flight) * parts.kept_per_token
        passing = max(parts.layer_passing(tokens), parts.head_passing(tokens) if gpu == found.head else 0)
        beside = parts.beside(counts[gpu], placement.limits[gpu], has_first=gpu == layers[0])
        fixed = CONTEXT_BYTES + held + beside
        predicted[gpu] = fixed + with_gaps(passing + kept)
    fits_all = all(predicted[gpu] <= placement.limits[gpu] for gpu in gpus)
    if not fits_all or _slowest(found, parts) > _UNEVEN * _slowest(placement, parts):
        return None
    return replace(found, predicted=predicted)


def _parts_of(placement: Placement, parts: ModelParts, gpu: int) -> list[PartSizes]:
    found = [part for part, place in zip(parts.layers, placement.layers, strict=True) if place == gpu]
    return found + [parts.embedding] * (placement.embedding == gpu) + [parts.head] * (placement.head == gpu)


def _slowest(placement: Placement, parts: ModelParts) -> float:
    return max(sum(part.time for part in _parts_of(placement, parts, gpu)) for gpu in placement.counts)


def _too_small(parts: ModelParts, sizes: StageSizes, limits: Mapping[int, int], tokens: int) -> ConfigError:
    """The error for a model that does not fit, with what the best split would need."""
    gpus = list(limits)
    if not gpus:
        return ConfigError(
            got="There is no GPU to place the model on.",
            need="A device map that splits a model needs GPUs.",
            fix="Use device_map='cpu', or make GPUs visible in CUDA_VISIBLE_DEVICES.",
        )
    cuts = closest_cuts(sizes, [limits[gpu] for gpu in gpus])
    needs: dict[int, int] = {}
    for number, (position, start, stop) in enumerate(cuts):
        stage = sizes.stage(start, stop, len(cuts) - 1 - number, math.inf)
        assert stage is not None, "everything fits where there is no limit"
        needs[gpus[position]] = stage.least
    each = ", ".join(f"{_gib(need)} of {_gib(limits[gpu])} GiB on GPU {gpu}" for gpu, need in needs.items())
    allowed = sum(limits.values())
    total = f" ({_gib(sum(needs.values()))} of {_gib(allowed)} GiB in all)" if len(gpus) > 1 else ""
    ways = [] if parts.is_4bit else ["load_in_4bit=True"]
    ways += ["a larger max_memory", "more GPUs in CUDA_VISIBLE_DEVICES", "a shorter max_seq_length"]
    return ConfigError(
        got=f"The model does not fit: {'the closest split' if len(gpus) > 1 else 'it'} needs {each}{total}.",
        need=f"Weights, adapter, optimizer and the activations of {tokens} tokens at a time, all layers recomputing, "
        "must stay within the limit of every GPU.",
        fix=f"Use {', '.join(ways[:-1])} or {ways[-1]}.",
    )


def describe(placement: Placement, parts: ModelParts) -> str:
    """``placement`` as a table for the log, one line for each GPU; numbers in GiB."""
    lines = [("GPU", "layers", "weights", "peak", "limit", "")]
    for gpu in placement.gpus:
        held = _parts_of(placement, parts, gpu)
        ends = ["embedding"] * (placement.embedding == gpu) + ["head"] * (placement.head == gpu)
        recomputing = placement.recomputing.get(gpu, 0)
        ends += [f"{recomputing} recompute"] * (recomputing > 0)
        lines.append(
            (
                str(gpu),
                _runs([index for index, place in enumerate(placement.layers) if place == gpu]),
                _gib(sum(part.weights for part in held)),
                _gib(placement.predicted[gpu]) if gpu in placement.predicted else "-",
                _gib(placement.limits[gpu]) if gpu in placement.limits else "-",
                ", ".join(ends),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[5]]).rstrip()
        for line in lines
    )


def _runs(indices: list[int]) -> str:
    """``"0-3, 8-11"``."""
    starts = [index for index in indices if index - 1 not in indices]
    stops = [index for index in indices if index + 1 not in indices]
    return ", ".join(f"{start}-{stop}" for start, stop in zip(starts, stops, strict=True)) or "-"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
