"""What a training step takes of each GPU, by component, for a model and a layout that need not exist yet.

Pure arithmetic over ``ModelParts``; nothing here knows torch. What is divided by what follows from

    DDP         a copy of everything on each GPU; gradients live in buckets
    FSDP2       states over ``shard`` ranks; what is gathered and reduced: ``devices/gathering.py``
    ZeRO 0-3    trained weights in float32, as our own settings of DeepSpeed have them: ``devices/zero.py``
    tensor      weights of layers, embedding and head; heads and MLP of the activations, not the residual stream
    pipeline    layers; a stage holds as many micro-batches as there are stages behind it, and one (1F1B)

Assumed where nothing was measured: NCCL takes ``NCCL_BYTES`` for each group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pantheraml.devices.activations import ActivationSizes
from pantheraml.devices.flight import in_flight
from pantheraml.devices.gathering import Trained, frozen_gathered, trained_gathered
from pantheraml.devices.layout import Layout
from pantheraml.devices.model_parts import ModelParts, PartSizes
from pantheraml.devices.optimizer_states import moment_bytes
from pantheraml.devices.peak_memory import (
    CONTEXT_BYTES,
    NCCL_BYTES,
    ONE_BUCKET_BYTES,
    EndGradients,
    Gathered,
    MemoryEstimate,
    Outliving,
    StepSizes,
    peak_memory,
)
from pantheraml.devices.zero import (
    Zero,
    ZeroWeights,
    bucket_of,
    waits_whole,
    zero_gathered,
    zero_states,
)
from pantheraml.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """A step of one rank.

    Attributes:
        tokens: of a micro-batch, padding included.
        micro_batches: of a step, one after the other.
        recomputing: layers that recompute, of each stage, the first ones.
        optim: transformers' name of the optimizer.
        room: bytes of a GPU that may be taken; FP8 weights keep their twins where there is much of it.
    """

    tokens: int
    micro_batches: int = 1
    recomputing: tuple[int, ...] = (0,)
    optim: str = "adamw_torch_fused"
    room: float = math.inf


@dataclass(frozen=True)
class Stage:
    """The layers of one GPU.

    Attributes:
        layers: of them, in order.
        ends: embedding and head, as far as they are here.
        has_head: whether the head computes here.
        later: stages behind this one.
    """

    layers: tuple[PartSizes, ...]
    ends: tuple[PartSizes, ...]
    has_head: bool
    later: int = 0


def even_stages(parts: ModelParts, count: int) -> list[Stage]:
    """The layers in ``count`` stages whose slowest is nearly as fast as possible, head included.

    Raises:
        ConfigError: fewer layers than stages.
    """
    if not 1 <= count <= len(parts.layers):
        raise ConfigError(
            got=f"A pipeline of {count} stages was asked for a model of {len(parts.layers)} layers.",
            need="Every stage has a layer or more.",
            fix=f"Use 1 to {len(parts.layers)} stages.",
        )
    times = [layer.time for layer in parts.layers]
    whole = sum(times) + parts.head.time
    cuts, passed = [0], 0.0
    for index, time in enumerate(times):
        left, made = len(times) - index, len(cuts)
        if (
            made < count
            and index > cuts[-1]
            and (passed + time / 2 > made * whole / count or left == count - made)
        ):
            cuts.append(index)
        passed += time
    edges = [*cuts, len(times)]
    stages: list[Stage] = []
    for number, (start, stop) in enumerate(pairwise(edges)):
        is_last = number == count - 1
        has_embedding = is_last if parts.tied else number == 0
        ends = (parts.embedding,) * has_embedding + (parts.head,) * is_last
        stages.append(Stage(parts.layers[start:stop], ends, is_last, count - 1 - number))
    return stages


def estimate(parts: ModelParts, layout: Layout, work: Work) -> tuple[MemoryEstimate, ...]:
    """What the GPUs of each stage take; one entry where there are no stages, since all GPUs are alike then."""
    stages = even_stages(parts, layout.pipeline)
    flags = work.recomputing if len(work.recomputing) == len(stages) else work.recomputing[:1] * len(stages)
    return tuple(
        peak_memory(stage_sizes(parts, layout, work, stage, recomputing))
        for stage, recomputing in zip(stages, flags, strict=True)
    )


def stage_sizes(parts: ModelParts, layout: Layout, work: Work, stage: Stage, recomputing: int) -> StepSizes:
    """The bytes of a step on a GPU that has ``stage``, of which the first ``recomputing`` layers recompute."""
    sizes = _computed_in(parts, layout)
    total = len(stage.layers)
    recomputing = min(recomputing, total)
    states = _states(parts, layout, work, stage)
    flight = in_flight(stage.later, stage.later + 1, work.micro_batches) if layout.pipeline > 1 else 1.0
    held = int(work.tokens * flight)
    whole, again = sizes.kept.all, sizes.kept.attended
    head = sizes.head_passing(work.tokens) if stage.has_head else 0
    kept_first, kept_last = (held * (again if recomputing >= count else whole) for count in (1, total))
    gathered = _gathered(parts, layout, stage, (kept_first, kept_last))
    return replace(
        states,
        outliving=_outliving(parts, layout, work, states.gradients),
        kept=held * (recomputing * again + (total - recomputing) * whole),
        kept_first=kept_first,
        gathered=gathered,
        late_gradients=_late_gradients(parts, layout, stage, states.gradients) if gathered.ends else 0,
        passing=sizes.layer_passing(work.tokens, recomputes=recomputing == total),
        passing_first=sizes.layer_passing(work.tokens, recomputes=recomputing > 0),
        logits=head,
        forward_logits=sizes.head_forward(work.tokens) if stage.has_head else 0,
        casts=_casts(parts, layout, sizes, stage.layers[recomputing:]),
        forward_casts=_casts(parts, layout, sizes, stage.layers),
        casts_left=_casts(parts, layout, sizes, stage.layers[min(recomputing, total - 1) :]),
        ends=_end_gradients(parts, layout, stage),
    )


def sizes_of(parts: ModelParts) -> ActivationSizes:
    """The widths of a model.

    Raises:
        ConfigError: parts without them.
    """
    if parts.activations is None:
        raise ConfigError(
            got="The sizes of this model do not say how wide its activations are.",
            need="Memory by component follows from the widths of a model of a known family.",
            fix="Measure it with pantheraml.models.weight_sizes.measure_parts.",
        )
    return parts.activations


def is_fused(parts: ModelParts, layout: Layout) -> bool:
    """Whether layers are computed by fused functions: not where ranks cut them, or ZeRO-3 gathers them part by part."""
    is_cut = layout.tensor > 1 or (layout.strategy == "deepspeed" and layout.zero_stage == 3)
    return sizes_of(parts).is_fused and not is_cut


def _computed_in(parts: ModelParts, layout: Layout) -> ActivationSizes:
    """The widths on one GPU; FSDP2 keeps the residual stream in 16 bits, too, where masters are in 32, and fused layers
    compute what it gathers in 16 bits.
    """
    sizes = replace(sizes_of(parts), is_fused=is_fused(parts, layout)).split(layout.tensor)
    if parts.full_finetuning and layout.strategy == "fsdp":
        return replace(sizes, size=sizes.computed)
    return sizes


def _late_gradients(parts: ModelParts, layout: Layout, stage: Stage, gradients: int) -> int:
    """Bytes of gradients that are not there until ranks have reduced them."""
    if layout.strategy == "deepspeed":
        return _zero(parts, layout).late(gradients)
    trained = [sum(part.trainable for part in some) for some in (stage.ends, (*stage.layers, *stage.ends))]
    return gradients * trained[0] // max(1, trained[1])


def _zero(parts: ModelParts, layout: Layout) -> Zero:
    """DeepSpeed with our own settings (distributed/strategies/deepspeed.py)."""
    trained = sum(part.trainable for part in parts.all)
    bucket = bucket_of(trained)
    waits = waits_whole(layout.zero_stage, trained, bucket)
    return Zero(layout.zero_stage, layout.shard, bucket, offload=layout.offload, waits=waits)


def _states(parts: ModelParts, layout: Layout, work: Work, stage: Stage) -> StepSizes:
    """Weights, what is trained, gradients and moments."""
    here = (*stage.layers, *stage.ends)
    full, tensor = parts.full_finetuning, layout.tensor
    # Embedding, norm and head are whole on every rank, and so are adapters.
    frozen_layers = 0 if full else sum(part.weights for part in stage.layers)
    frozen_ends = 0 if full else sum(part.weights for part in stage.ends)
    numbers = sum(part.trainable for part in here) // (tensor if full else 1)
    layers, room = len(stage.layers), work.room
    frozen = frozen_layers // tensor + frozen_ends
    has_first = stage.later + 1 == layout.pipeline
    beside = parts.beside(layers, room, has_first=has_first) if is_fused(parts, layout) else 0
    if layout.is_sharded and layout.shard_frozen:
        # Stacks and twins are made anew of what was gathered, for a layer at a time; 4-bit buffers always were.
        frozen = frozen_layers // layout.shard + frozen_ends
        if parts.storage != "4bit" and beside:
            beside = parts.beside(1, 0) + max(part.weights for part in stage.layers)
    if layout.strategy == "deepspeed":
        if layout.zero_stage == 3:  # which cuts every weight
            frozen = (frozen_layers + frozen_ends) // layout.shard
        trainable, gradients, optimizer = zero_states(_zero(parts, layout), numbers, work.optim)
    else:
        trainable, gradients, optimizer = _plain_states(parts, layout, work.optim, numbers)
        if layout.offload:
            frozen = trainable = gradients = optimizer = 0
    buffers = beside if parts.storage == "4bit" else 0
    return StepSizes(
        weights=frozen + beside - buffers,
        buffers=buffers,
        trainable=trainable,
        gradients=gradients,
        optimizer=optimizer,
        outliving=Outliving(),
        kept=0,
        kept_first=0,
        passing=0,
        passing_first=0,
        logits=0,
        driver=CONTEXT_BYTES + NCCL_BYTES * layout.groups,
    )


def _outliving(parts: ModelParts, layout: Layout, work: Work, gradients: int) -> Outliving:
    """Which of ``gradients`` bytes outlive a backward."""
    full, sums = parts.full_finetuning, work.micro_batches > 1
    if layout.strategy == "deepspeed":
        return _zero(parts, layout).outliving(sums=sums)
    if layout.strategy == "tensor":
        return Outliving(buckets=True)
    if layout.strategy == "ddp" or (layout.strategy == "fsdp" and not full):
        # Beside weights that are gathered DDP reduces all of it at once, when every rank has done its passes.
        return Outliving(True, sums, late=layout.is_sharded or gradients <= ONE_BUCKET_BYTES)
    return Outliving(sums=sums or layout.strategy == "pipeline")


def _end_gradients(parts: ModelParts, layout: Layout, stage: Stage) -> EndGradients:
    """Those of embedding and head, as far as they are here; none where they are shared out as they come."""
    if not parts.full_finetuning or layout.strategy in ("fsdp", "deepspeed"):
        return EndGradients()
    size, sizes = parts.trained_size // layout.tensor, sizes_of(parts)
    return EndGradients(
        head=sizes.vocabulary * sizes.hidden * size * stage.has_head,
        embedding=parts.embedding.trainable * size * (parts.embedding in stage.ends),
        is_tied=parts.tied,
    )


def _plain_states(parts: ModelParts, layout: Layout, optim: str, numbers: int) -> tuple[int, int, int]:
    """Trainable, gradients and optimizer of ``numbers`` that are trained."""
    is_shared_out = layout.strategy == "fsdp" and parts.full_finetuning
    share = -(-numbers // layout.shard) if is_shared_out else numbers
    size = parts.trained_size
    return share * size, share * size, share * moment_bytes(optim, size)


def _gathered(parts: ModelParts, layout: Layout, stage: Stage, kept: tuple[int, int]) -> Gathered:
    """Bytes that are gathered, or wait to be sent; ``kept``: what the first layer, and the last, keeps."""
    sizes, full = _computed_in(parts, layout), parts.full_finetuning
    if layout.strategy == "deepspeed":
        gone = kept[1] if sizes.computes_fused else 0
        return zero_gathered(_zero(parts, layout), _zero_weights(parts), gone)
    if not layout.is_sharded or layout.shard == 1:
        return Gathered()
    if not full:
        largest = max(layer.weights for layer in stage.layers)
        return frozen_gathered(largest) if layout.shard_frozen else Gathered()
    numbers = Trained(
        layer=max(one.trainable for one in stage.layers),
        ends=sum(one.trainable for one in stage.ends),
        head=sizes.vocabulary * sizes.hidden,
        is_tied=parts.tied,
    )
    return trained_gathered(numbers, sizes.computed, layout.shard, kept)


def _zero_weights(parts: ModelParts) -> ZeroWeights:
    """Whole weights by what ZeRO gathers and reduces."""
    full, sizes = parts.full_finetuning, sizes_of(parts)
    trained = sum(part.trainable for part in parts.all)
    return ZeroWeights(
        trained=trained,
        head=sizes.vocabulary * sizes.hidden if full else 0,
        is_tied=parts.tied,
        layer=max(part.trainable for part in parts.layers),
        numbers=trained + (0 if full else sum(part.numbers for part in parts.all)),
        bytes=trained * parts.trained_size + (0 if full else sum(part.weights for part in parts.all)),
    )


def _casts(parts: ModelParts, layout: Layout, sizes: ActivationSizes, layers: Sequence[PartSizes]) -> int:
    """16-bit copies that autocast makes of masters, for the whole pass; what is gathered is in 16 bits already."""
    if not parts.full_finetuning or sizes.computed >= sizes.size:
        return 0
    return sum(layer.numbers for layer in layers) * sizes.computed // layout.tensor
