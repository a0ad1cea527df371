"""The plan of a run: how its work is laid out over GPUs, what recomputes, and how many rows go through at a time.

``choose_plan`` is the one entry: it counts the memory of every layout that can be (``devices/estimate.py``), drops what
does not fit, and takes of the rest, in this order,

    a copy on every GPU (``ddp``; ``none`` on one GPU)     where the whole model trains on one
    ``fsdp``                                               weights sharded; where asked for, frozen ones only by need
    ``tensor``, then ``pipeline``                          only where nothing above fits, or they are asked for
    shards in host memory                                  where ``offload`` allows it and nothing else fits

and within one of these what is fastest by ``devices/step_time.py``. ``deepspeed`` is planned when it is asked for.

    choice = choose_plan(PlanRequest(parts, gpus=(gpu_of("NVIDIA H200", free_bytes),) * 8, seq=4096))
    choice.plan.layout.strategy, choice.plan.memory[0].reserved, choice.reason
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pantheraml.devices.estimate import Work, estimate, even_stages, sizes_of, stage_sizes
from pantheraml.devices.known_gpus import GIB, GpuKind
from pantheraml.devices.layout import SPREADS, Layout, Spread
from pantheraml.devices.model_parts import ModelParts
from pantheraml.devices.peak_memory import MemoryEstimate, peak_memory
from pantheraml.devices.plan_advice import nothing_fits
from pantheraml.devices.step_time import StepTime, step_time
from pantheraml.errors import ConfigError

# Of a GPU's memory, what a plan may take by the estimate: it errs by up to a few percent.
USABLE = 0.95
# Tokens of a GPU's step where nobody says how many rows it has: enough to keep the products busy (H200, 8B).
USUAL_TOKENS = 8192
_ORDER: dict[Spread, int] = {"none": 0, "ddp": 0, "fsdp": 1, "deepspeed": 1, "tensor": 2, "pipeline": 3}
_LAST = 4


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned.

    Attributes:
        parts: the model, from ``models.weight_sizes.measure_parts``: it knows what is trained and how weights are held.
        gpus: all of them, each with the memory that may be taken.
        seq: tokens of the longest row.
        rows: of a step, for each GPU; None is about 8,192 tokens.
        optim: transformers' name of the optimizer.
        recompute: True, False, or "auto" for as few layers as memory asks for.
        strategy: the one to plan for, or None to choose.
        offload: whether what is sharded may lie in host memory, whose room is not counted.
        allowed: strategies that may be chosen.
        host: GPUs of a host, within which sharding is fast.
        measured: of what is estimated, what a probe measured.
    """

    parts: ModelParts
    gpus: tuple[GpuKind, ...]
    seq: int
    rows: int | None = None
    optim: str = "adamw_torch_fused"
    recompute: bool | Literal["auto"] = "auto"
    strategy: Spread | None = None
    offload: bool = False
    allowed: tuple[Spread, ...] = ("none", "ddp", "fsdp", "tensor", "pipeline")
    host: int = 8
    measured: float = 1.0

    @property
    def limit(self) -> float:
        """Bytes that a plan may take of each GPU, by the estimate."""
        return USABLE * min(gpu.memory for gpu in self.gpus) / self.measured

    @property
    def rows_each(self) -> int:
        """Rows of a step, for each GPU."""
        return self.rows or max(1, USUAL_TOKENS // self.seq)


@dataclass(frozen=True)
class Plan:
    """One way to do it.

    Attributes:
        layout: of the work.
        work: of a rank.
        rows: of a micro-batch.
        memory: of the GPUs of each stage; one entry where all are alike.
        time: of a step, by a simple model.
    """

    layout: Layout
    work: Work
    rows: int
    memory: tuple[MemoryEstimate, ...]
    time: StepTime

    @property
    def fullest(self) -> MemoryEstimate:
        """Of the GPU that holds the most."""
        return max(self.memory, key=lambda one: one.reserved)


@dataclass(frozen=True)
class PlanChoice:
    """What was chosen, and why.

    Attributes:
        plan: the chosen one.
        reason: as a sentence.
        runner_up: the next, of another layout; None where there is none.
        others: layouts that do not fit, with the bytes that the fullest GPU would need at least.
        limit: bytes that a plan may take of each GPU.
    """

    plan: Plan
    reason: str
    runner_up: Plan | None
    others: Mapping[Layout, int] = field(default_factory=dict[Layout, int])
    limit: float = 0.0


def choose_plan(
    request: PlanRequest, alternatives: Mapping[str, Callable[[], ModelParts | None]] | None = None
) -> PlanChoice:
    """The plan for ``request``.

    Args:
        request: model, GPUs and rows.
        alternatives: what could be trained instead, by how it is asked for (``"--method qlora"``), for the advice where
            nothing fits.

    Raises:
        NothingFits: with the three cheapest changes and what each would save.
        ConfigError: a strategy that cannot be, with degrees that can.
    """
    _check(request)
    fitting: list[Plan] = []
    others: dict[Layout, int] = {}
    for layout in layouts(request):
        best = best_plan(request, layout)
        if best is None:
            others[layout] = least_bytes(request, layout)
        else:
            fitting.append(best)
    if not fitting:
        raise nothing_fits(request, min(others.values()), _least, alternatives or {})
    fitting.sort(key=lambda plan: (_rank(plan.layout), -plan.time.tokens_per_second))
    chosen = fitting[0]
    next_ = next((plan for plan in fitting[1:] if plan.layout != chosen.layout), None)
    return PlanChoice(chosen, _reason(request, chosen, others), next_, others, request.limit)


def _check(request: PlanRequest) -> None:
    if not request.gpus:
        raise ConfigError(
            got="There is no GPU to plan for.",
            need="A plan says what each GPU does.",
            fix="Name some, such as --gpus 8xH200.",
        )
    numbers = {"seq": request.seq, "rows": 1 if request.rows is None else request.rows}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(
                got=f"{name}={value} was given.",
                need="It is a whole number of 1 or more.",
                fix="Give another one.",
            )
    if request.strategy is not None and request.strategy not in SPREADS:
        raise ConfigError(
            got=f"strategy={request.strategy!r} was given.",
            need=f"It is one of {', '.join(SPREADS)}.",
            fix="Leave it out to have one chosen.",
        )
    slow = next((gpu.name for gpu in request.gpus if not gpu.has_fp8), None)
    if request.parts.storage == "fp8" and slow is not None:
        raise ConfigError(
            got=f"FP8 weights were asked for on {slow}.",
            need="FP8 products need a GPU of compute capability 8.9 or newer (RTX 40, L4, H100, H200, B200, …).",
            fix="Use 16 or 4 bits: load_in_16bit=True or load_in_4bit=True.",
        )
    if not any(True for _ in layouts(request)):
        raise _no_layout(request)


def _no_layout(request: PlanRequest) -> ConfigError:
    sizes, count = sizes_of(request.parts), len(request.gpus)
    what = request.strategy or "any strategy"
    degrees = [degree for degree in range(2, count + 1) if _may_split(request, degree)]
    counts = ", ".join(map(str, degrees)) or "none"
    return ConfigError(
        got=f"strategy={what!r} was asked for {count} GPU{'s' if count > 1 else ''} and this model.",
        need='"ddp", "fsdp" and "deepspeed" need two GPUs or more, "none" is for one; a tensor-parallel degree divides '
        f"the GPUs, {sizes.heads} heads and {_kv_heads(request.parts)} kv heads of frozen weights in 16 or 32 bits "
        f"(here: {counts}); a pipeline has at most {len(request.parts.layers)} stages.",
        fix="Leave the strategy out to have one chosen.",
    )


def layouts(request: PlanRequest) -> Iterator[Layout]:
    """Every layout that can be of all GPUs, whether it fits or not."""
    count, full = len(request.gpus), request.parts.full_finetuning
    wanted = request.allowed if request.strategy is None else (request.strategy,)
    if count == 1 and "none" in wanted:
        yield Layout("none")
    if count > 1 and "ddp" in wanted:
        yield Layout("ddp", data=count)
    if count > 1 and "fsdp" in wanted:
        host = request.host
        shards = (count, host) if 1 < host < count and count % host == 0 else (count,)
        for shard in shards:
            # Beside an adapter, whose frozen weights are whole then, that is DDP by another name.
            if not full and request.strategy == "fsdp":
                yield Layout("fsdp", data=count, shard=shard)
            yield Layout("fsdp", data=count, shard=shard, shard_frozen=True)
        if request.offload:
            yield Layout("fsdp", data=count, shard=count, shard_frozen=True, offload=True)
    if count > 1 and request.strategy == "deepspeed":
        for stage in (1, 2, 3):
            for offload in (False, True)[: 1 + request.offload]:
                yield Layout("deepspeed", data=count, shard=count, shard_frozen=stage == 3, zero_stage=stage,
                             offload=offload)  # fmt: skip
    for degree in (degree for degree in range(2, count + 1) if count % degree == 0):
        if "tensor" in wanted and _may_split(request, degree):
            yield Layout("tensor", data=count // degree, tensor=degree)
        if "pipeline" in wanted and degree <= len(request.parts.layers):
            yield Layout("pipeline", data=count // degree, pipeline=degree)


def _kv_heads(parts: ModelParts) -> int:
    sizes = sizes_of(parts)
    return sizes.keys * sizes.heads // sizes.queries


def _may_split(request: PlanRequest, degree: int) -> bool:
    """Whether heads and kv heads can be shared by ``degree`` ranks; packed weights, experts and what is trained in full
    are not cut.
    """
    parts, sizes = request.parts, sizes_of(request.parts)
    is_even = sizes.heads % degree == 0 and _kv_heads(parts) % degree == 0
    can_be_cut = parts.storage == "plain" and not sizes.experts and not parts.full_finetuning
    return is_even and len(request.gpus) % degree == 0 and can_be_cut


def best_plan(request: PlanRequest, layout: Layout) -> Plan | None:
    """The fastest way to do ``layout`` that fits; None where none does."""
    found: list[Plan] = []
    for rows in (one for one in range(request.rows_each, 0, -1) if request.rows_each % one == 0):
        work = _work(request, layout, rows)
        recomputing = _fewest(request, layout, work)
        if recomputing is not None:
            work = _work(request, layout, rows, recomputing)
            time = step_time(request.parts, layout, work, request.seq, request.gpus[0])
            found.append(Plan(layout, work, rows, estimate(request.parts, layout, work), time))
    return max(found, key=lambda plan: plan.time.tokens_per_second, default=None)


def _work(request: PlanRequest, layout: Layout, rows: int, recomputing: tuple[int, ...] = (0,)) -> Work:
    """A step in micro-batches of ``rows`` rows: all GPUs' rows, shared by the groups that have rows of their own."""
    of_group = request.rows_each * layout.gpus // layout.data
    return Work(request.seq * rows, -(-of_group // rows), recomputing, request.optim, request.limit)


def _fewest(request: PlanRequest, layout: Layout, work: Work) -> tuple[int, ...] | None:
    """The fewest layers of each stage that must recompute; None where not even all do."""
    found: list[int] = []
    for stage in even_stages(request.parts, layout.pipeline):
        total = len(stage.layers)
        first = total if request.recompute is True else 0
        last = 0 if request.recompute is False else total
        fits = (
            count
            for count in range(first, last + 1)
            if peak_memory(stage_sizes(request.parts, layout, work, stage, count)).reserved <= request.limit
        )
        fewest = next(fits, None)
        if fewest is None:
            return None
        found.append(fewest)
    return tuple(found)


def least_bytes(request: PlanRequest, layout: Layout) -> int:
    """What the fullest GPU needs at least: rows one by one, everything recomputing unless that was refused."""
    stages = even_stages(request.parts, layout.pipeline)
    flags = tuple(0 if request.recompute is False else len(stage.layers) for stage in stages)
    return max(one.reserved for one in estimate(request.parts, layout, _work(request, layout, 1, flags)))


def _least(request: PlanRequest) -> int:
    return min(least_bytes(request, layout) for layout in layouts(request))


def _rank(layout: Layout) -> int:
    return _LAST if layout.offload else _ORDER[layout.strategy]


def _reason(request: PlanRequest, chosen: Plan, others: Mapping[Layout, int]) -> str:
    need, limit = chosen.fullest.reserved / GIB, request.limit / GIB
    takes = f"{need:.1f} of {limit:.1f} GiB that may be taken"
    if request.strategy is not None:
        return f"{request.strategy} was asked for, and takes {takes} of a GPU"
    copies = [size for layout, size in others.items() if layout.strategy in ("none", "ddp")]
    strategy = chosen.layout.strategy
    if strategy in ("none", "ddp"):
        return f"the whole model trains on one GPU, and takes {takes}"
    why = f"a copy on each GPU would need {min(copies) / GIB:.1f} GiB or more; " if copies else ""
    if strategy == "fsdp":
        what = "sharded" if chosen.layout.shard_frozen else "with only what is trained sharded"
        return f"{why}{what}, each takes {takes}"
    return f"{why}nothing that keeps layers whole fits; so, each takes {takes}"
