"""How long a step takes by a simple model: enough to rank layouts, not to promise a speed.

    compute         operations of the products and of attention / (share of the peak x the GPU's TFLOP/s)
    updating        bytes of what is trained, its gradients and moments / bandwidth of the GPU's memory
    launching       a layer takes its host no less than a fixed time, however few tokens there are
    communication   bytes / bandwidth; hidden behind the compute where something is computed meanwhile
    waiting         the first and the last micro-batches of a pipeline: (stages - 1) / micro-batches

Shares of the peak are those measured on one H200 with the 8B shape (docs/performance.md); the full fine-tuning one is
an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.devices.estimate import Work, even_stages, is_fused, sizes_of
from pantheraml.devices.known_gpus import GpuKind
from pantheraml.devices.layout import Layout
from pantheraml.devices.model_parts import ModelParts
from pantheraml.devices.stage_split import RECOMPUTE_TIME

# Of the 16-bit peak, what a step reaches by how frozen weights are held (17,892, 17,461, 23,814 tok/s), and when
# everything is trained. FP8 products run faster than that peak's.
_SHARES = {"plain": 0.58, "4bit": 0.56, "fp8": 0.77}
_FULL_SHARE = 0.45
# Of layers with adapters that are not fused: an assumption.
_STOCK_SHARE = 0.3
# Seconds of the host for forward and backward of one layer (H200 machines: 75 to 97 ms for 32 layers).
_LAUNCH = 0.0026
# Forward, gradient of the input, gradient of the weight: operations for a number of a weight and a token.
_PER_NUMBER, _PER_TRAINED = 4, 6
# Attention, causal: two products forward and five backward, of half the positions.
_ATTENTION = 7
# What communication that is hidden costs the kernels beside it, and what gathering costs the host.
_BESIDE = 0.03
# GB/s between host and GPU.
_HOST_LINK = 55.0
# Numbers that a rank's share of the host's cores updates in a second: an assumption.
_HOST_NUMBERS = 1e9
# A sum over all ranks moves every byte twice, a gathering or scattering once.
_BOTH_WAYS = 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: with what recomputes.
        communication: that nothing hides.
        waiting: of a pipeline.
        tokens: of the step, on all GPUs.
    """

    compute: float
    communication: float
    waiting: float
    tokens: int

    @property
    def seconds(self) -> float:
        """All."""
        return self.compute + self.communication + self.waiting

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens / self.seconds


def step_time(parts: ModelParts, layout: Layout, work: Work, seq: int, gpu: GpuKind) -> StepTime:
    """The time of a step.

    Args:
        parts: the model.
        layout: of the work.
        work: of one rank.
        seq: tokens of a row, padding included.
        gpu: of which all are.
    """
    slowest = _slowest_stage(parts, layout, work)
    passes = work.micro_batches
    compute = passes * max(
        _operations(parts, slowest, work.tokens, seq)
        / layout.tensor
        / (_share(parts, layout) * gpu.tflops * 1e12),
        _LAUNCH * len(parts.layers) / layout.pipeline,
    )
    compute += _update(parts, layout) / (gpu.memory_gb_s * 1e9)
    hidden, open_ = _communication(parts, layout, work, gpu.link_gb_s * 1e9)
    # What is hidden shows as far as it takes longer than the compute.
    communication = open_ + max(0.0, hidden - compute) + _BESIDE * min(hidden, compute)
    if layout.offload:
        communication += passes * _between_host_and_gpu(parts, layout) / (_HOST_LINK * 1e9)
        communication += sum(part.trainable for part in parts.all) / layout.shard / _HOST_NUMBERS
    waiting = compute * (layout.pipeline - 1) / passes
    return StepTime(compute, communication, waiting, work.tokens * passes * layout.data)


def _between_host_and_gpu(parts: ModelParts, layout: Layout) -> float:
    """Bytes of a pass: of FSDP2 shards twice to the GPU and gradients back; of ZeRO gradients and weights once."""
    trained = sum(part.trainable for part in parts.all) * parts.trained_size / layout.shard
    if layout.strategy != "fsdp":
        return trained
    frozen = 0 if parts.full_finetuning else sum(part.weights for part in parts.all) / layout.shard
    return 3 * trained + 2 * frozen


def _update(parts: ModelParts, layout: Layout) -> float:
    """Bytes that the optimizer's step reads and writes: numbers and two moments both ways, gradients once."""
    shards = layout.shard if layout.strategy in ("fsdp", "deepspeed") else 1
    numbers = sum(part.trainable for part in parts.all) / (shards * layout.tensor * layout.pipeline)
    return 7 * parts.trained_size * numbers


def _slowest_stage(parts: ModelParts, layout: Layout, work: Work) -> float:
    """Time of a token through the slowest stage, where a layer takes 1.0, recompute included."""
    stages = even_stages(parts, layout.pipeline)
    flags = work.recomputing if len(work.recomputing) == len(stages) else work.recomputing[:1] * len(stages)
    times: list[float] = []
    for stage, recomputing in zip(stages, flags, strict=True):
        layers = [layer.time for layer in stage.layers]
        head = parts.head.time if stage.has_head else 0.0
        # In a step that trains weights, too, what recomputes is a smaller part.
        again = RECOMPUTE_TIME * (_PER_NUMBER / _PER_TRAINED if parts.full_finetuning else 1.0)
        times.append(sum(layers) + head + again * sum(layers[:recomputing]))
    return max(times)


def _operations(parts: ModelParts, time: float, tokens: int, seq: int) -> float:
    """Floating-point operations of a pass through what takes a token ``time``."""
    per_number = _PER_TRAINED if parts.full_finetuning else _PER_NUMBER
    attention = _ATTENTION * seq * sizes_of(parts).queries
    return tokens * time * (per_number * parts.used + attention)


def _share(parts: ModelParts, layout: Layout) -> float:
    if parts.full_finetuning:
        return _FULL_SHARE
    return _SHARES[parts.storage] if is_fused(parts, layout) else _STOCK_SHARE


def _communication(parts: ModelParts, layout: Layout, work: Work, bandwidth: float) -> tuple[float, float]:
    """Seconds that may be hidden behind the compute, and that may not."""
    sizes, passes = sizes_of(parts), work.micro_batches
    numbers = sum(part.trainable for part in parts.all) // (layout.tensor * layout.pipeline)
    gradients = numbers * parts.trained_size
    around = (layout.data - 1) / layout.data
    hidden = open_ = 0.0
    if layout.is_sharded:
        frozen = (
            sum(part.weights for part in parts.all)
            if layout.shard_frozen and not parts.full_finetuning
            else 0
        )
        gathered = frozen + numbers * (2 if parts.full_finetuning else parts.trained_size)
        inside = (layout.shard - 1) / layout.shard
        # Gathered for the forward and for the backward of every micro-batch; gradients are scattered as often.
        hidden += passes * (2 * gathered + gradients) * inside / bandwidth
    elif layout.data > 1:
        # Those of adapters are one bucket, sent at the end; others go while the backward goes on.
        seconds = _BOTH_WAYS * gradients * around / bandwidth
        hidden, open_ = (seconds, 0.0) if parts.full_finetuning else (0.0, seconds)
    if layout.tensor > 1:
        # Two sums of the hidden states forward and two backward in every layer.
        states = work.tokens * sizes.hidden * sizes.computed
        inside = (layout.tensor - 1) / layout.tensor
        per_layer = 4 * _BOTH_WAYS * states * inside / bandwidth
        open_ += passes * per_layer * len(parts.layers) / layout.pipeline
    if layout.pipeline > 1:
        hidden += passes * 2 * work.tokens * sizes.hidden * sizes.size / bandwidth
    return hidden, open_
