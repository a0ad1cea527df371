"""How a run is spread over GPUs: the dataclass that scripts pass around. It knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal, NamedTuple, cast, get_args

from pantheraml.errors import ConfigError, did_you_mean

Backend = Literal["nccl", "gloo", "mpi"]
ReduceDtype = Literal["float32", "bfloat16"]
Strategy = Literal["auto", "ddp", "fsdp", "deepspeed", "tensor", "pipeline", "none"]

# How rows of a step are shared out; numbers are a share for each rank.
BatchSplit = Literal["even", "memory", "speed"] | Sequence[float]

CpuOffload = bool | Literal["optimizer"]

# Names of ways to recompute activations; True and False are ways, too.
Recompute = Literal["auto", "offload", "unsloth"]

# Ways to recompute activations, as every argument of that name takes them.
RECOMPUTE_POLICIES = (True, False, *get_args(Recompute))
# Micro-batches of a split model for each GPU, where no number is given: a tenth to a fifth of the time is waiting.
PER_GPU = 4
# Strategies that a degree asks for, by its field.
DEGREES = {"tensor_parallel": "tensor", "pipeline_parallel": "pipeline"}


@dataclass(frozen=True)
class MultiGPUConfig:
    """Settings of a run on several GPUs.

    Attributes:
        backend: how ranks talk: ``"nccl"`` between GPUs, ``"gloo"`` between CPUs (and what ``"nccl"`` means where ranks
            have no GPU), ``"mpi"`` where torch was built with it.
        timeout_minutes: how long a collective may wait for a rank before the run ends.
        auto_device_map: split a model that does not fit on one GPU between all of them where ranks cannot share out its
            weights (those in 8 bits, and programs that cannot be started again) or shares do not fit either; in the
            place of a ``device_map`` of None.
        tensor_parallel: how many GPUs compute each layer together; True is all of them.
        pipeline_parallel: how many GPUs have the layers of one model between them; True is all of them. Each rank is
            such a pipeline, with rows of its own.
        use_gradient_checkpointing: as in ``FastLanguageModel.from_pretrained``, for the model of the trainer.
        find_unused_parameters: look after every backward for trained weights that took no part; needed by models of
            which parts are skipped, slower for all others.
        strategy: how the work is spread. ``"ddp"``: every rank has the model and rows of its own; ``"fsdp"``: every
            rank has rows of its own and a share of the weights, which are gathered layer by layer (FSDP2);
            ``"deepspeed"``: the same by DeepSpeed's ZeRO; ``"tensor"``: ranks compute each layer together;
            ``"pipeline"``: the layers of one model are on several GPUs; ``"none"``: one process, however many GPUs
            there are; ``"auto"``: what the planner chooses: ``"ddp"`` where a GPU trains the whole model, else
            ``"fsdp"``.
        zero_stage: of DeepSpeed: what is sharded; 1 the optimizer, 2 gradients too, 3 weights too, 0 nothing.
        cpu_offload: keep what is sharded in host memory while it is not computed with: True, or ``"optimizer"`` alone
            (DeepSpeed).
        shard_frozen: of ``"fsdp"``: whether weights that are not trained are sharded; None: where a GPU does not hold
            them all.
        shard_size: of ``"fsdp"``: how many ranks share one copy of what is sharded; None is all of them. Several
            machines with a copy each (HSDP) write the number of GPUs of one.
        num_processes: ranks on this machine; None is one for each visible GPU, or for each pipeline. Without GPUs they
            run on the CPU.
        max_memory: as in ``FastLanguageModel.from_pretrained``, for the model that this config is passed with.
        micro_batches: into how many a step of a split model is cut; None is four for each GPU, as far as there
            are rows.
        hang_seconds: how long a rank may be without progress in a step before the run ends with a report of where it
            hangs (a single process reports and goes on); three times the longest step so far, if that is more.
            First steps, callbacks, saving and evaluating may take longer. None or 0: nobody watches.
        max_restarts: how often ranks that the script started are started again after one of them has died; the run goes
            on with its last whole checkpoint, on as many GPUs as there are then (where ``num_processes`` is None).
        reduce_dtype: in what gradients are sent and averaged: None is the dtype of the trained weights (float32 for
            LoRA, which is exact); ``"bfloat16"`` sends half of that, and rounds; ``"float32"`` is for weights in bf16.
        batch_split: how ranks share the rows of a step: ``"even"``; ``"memory"``: by what is free on their GPUs beside
            the model; ``"speed"``: by how fast they multiply, measured at the start; or a number for each rank, such
            as ``(2, 1)``. ``per_device_train_batch_size`` is the mean then; losses and gradients do not change.

    Raises:
        ConfigError: a value that cannot be, or two that contradict each other.
    """

    backend: Backend = "nccl"
    timeout_minutes: float = 30
    auto_device_map: bool = True
    tensor_parallel: bool | int = False
    pipeline_parallel: bool | int = False
    use_gradient_checkpointing: bool | str = "auto"
    find_unused_parameters: bool = False
    strategy: Strategy = "auto"
    num_processes: int | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    micro_batches: int | None = None
    zero_stage: int = 2
    cpu_offload: CpuOffload = False
    shard_frozen: bool | None = None
    shard_size: int | None = None
    reduce_dtype: ReduceDtype | None = None
    hang_seconds: float | None = 50
    max_restarts: int = 0
    batch_split: BatchSplit = "even"

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, get_args(Backend))
        _one_of("strategy", self.strategy, get_args(Strategy))
        _one_of("reduce_dtype", self.reduce_dtype, (None, *get_args(ReduceDtype)))
        _one_of("use_gradient_checkpointing", self.use_gradient_checkpointing, RECOMPUTE_POLICIES)
        for name in ("auto_device_map", "find_unused_parameters"):
            _one_of(name, getattr(self, name), (True, False))
        _number("timeout_minutes", self.timeout_minutes, (int, float))
        if not isinstance(cast("object", self.max_memory), Mapping | None):
            raise ConfigError(
                got=f"MultiGPUConfig(max_memory={self.max_memory!r}) was given.",
                need="It is a mapping from GPUs to limits.",
                fix="Write max_memory={0: '20GB', 1: '10GB'}, for example.",
            )
        if self.hang_seconds is not None:
            _number("hang_seconds", self.hang_seconds, (int, float), zero=True)
        _number("max_restarts", self.max_restarts, (int,), zero=True)
        for name in ("num_processes", "micro_batches", "shard_size"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), (int,))
        _one_of("zero_stage", self.zero_stage, (0, 1, 2, 3))
        _one_of("cpu_offload", self.cpu_offload, (True, False, "optimizer"))
        _one_of("shard_frozen", self.shard_frozen, (None, True, False))
        for name in DEGREES:
            if not isinstance(getattr(self, name), bool):
                _number(name, getattr(self, name), (int,))
        if isinstance(self.batch_split, str) or not _are_shares(self.batch_split):
            _one_of("batch_split", self.batch_split, ("even", "memory", "speed"))
        contradiction = find_contradiction(self)
        if contradiction is not None:
            raise ConfigError(*contradiction[1:])

    @property
    def way(self) -> Strategy:
        """The strategy that is asked for, by its name or by a degree."""
        return way_of(self)


def way_of(settings: Any) -> Strategy:
    """The strategy that ``settings`` (a config, or what has its attributes) ask for, by its name or by a degree."""
    asked = [way for name, way in DEGREES.items() if is_several(getattr(settings, name))]
    return cast(Strategy, asked[0]) if asked and settings.strategy == "auto" else settings.strategy


def is_several(degree: bool | int) -> bool:
    """Whether a degree asks for more than one GPU; True is all of them."""
    return degree is True or degree > 1


class Contradiction(NamedTuple):
    """Fields that contradict one another, and the three parts of the error."""

    fields: tuple[str, ...]
    got: str
    need: str
    fix: str


def find_contradiction(settings: Any) -> Contradiction | None:
    """What fields of ``settings`` (a config, or what has its attributes) contradict one another."""
    way = way_of(settings)
    for name, its_way in DEGREES.items():
        degree = getattr(settings, name)
        if is_several(degree) and way != its_way:
            return Contradiction(
                ("strategy", name),
                f"MultiGPUConfig(strategy={settings.strategy!r}, {name}={degree!r}) was given.",
                f"{name} is the degree of strategy={its_way!r}.",
                f"Keep one of them: strategy={its_way!r} with {name}={degree!r}, or strategy={way!r} without it.",
            )
    fields_of = {
        "shard_frozen": ("fsdp",), "shard_size": ("fsdp",), "cpu_offload": ("fsdp", "deepspeed"),
        "zero_stage": ("deepspeed",), "reduce_dtype": ("ddp", "pipeline", "auto"),
        "batch_split": ("ddp", "fsdp", "deepspeed", "auto"),
    }  # fmt: skip
    for name, ways in fields_of.items():
        value = getattr(settings, name)
        if value != getattr(MultiGPUConfig, name) and way not in ways:
            names = " and ".join(f"strategy={one!r}" for one in ways if one != "auto")
            return Contradiction(
                ("strategy", name),
                f"MultiGPUConfig(strategy={settings.strategy!r}, {name}={value!r}) was given.",
                f"{name} is a setting of {names}.",
                f"Write strategy={ways[-1]!r}, or leave {name} out.",
            )
    if settings.cpu_offload == "optimizer" and way == "fsdp":
        return Contradiction(
            ("strategy", "cpu_offload"),
            'MultiGPUConfig(strategy="fsdp", cpu_offload="optimizer") was given.',
            "FSDP2 offloads weights, gradients and optimizer together.",
            'Write cpu_offload=True, or strategy="deepspeed" for the optimizer alone.',
        )
    if settings.cpu_offload and way == "deepspeed" and settings.zero_stage == 0:
        return Contradiction(
            ("zero_stage", "cpu_offload"),
            f'MultiGPUConfig(strategy="deepspeed", zero_stage=0, cpu_offload={settings.cpu_offload!r}) was given.',
            "Stage 0 shards nothing, and only what is sharded is offloaded.",
            "Write zero_stage=1 or more, or leave cpu_offload out.",
        )
    return None


def config_of(value: object) -> MultiGPUConfig:
    """A config from what scripts pass as one: the dataclass, a mapping of its fields, True, or None.

    Raises:
        ConfigError: anything else, or an unknown field.
    """
    if isinstance(value, MultiGPUConfig):
        return value
    if value is None or value is True:
        return MultiGPUConfig()
    if not isinstance(value, Mapping):
        raise ConfigError(
            got=f"{value!r} was given as the settings for several GPUs.",
            need="They are a MultiGPUConfig.",
            fix="Write MultiGPUConfig(num_processes=2), for example, or leave it out.",
        )
    settings = {str(name): one for name, one in cast("Mapping[Any, Any]", value).items()}
    known = [field.name for field in fields(MultiGPUConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(
                got=f"{name!r} was given as a field of MultiGPUConfig.",
                need=f"Its fields are {', '.join(known)}.",
                fix=did_you_mean(name, known) or "Remove it.",
            )
    return MultiGPUConfig(**settings)


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise ConfigError(
            got=f"MultiGPUConfig({name}={value!r}) was given.",
            need=f"It is one of {', '.join(map(repr, known))}.",
            fix=did_you_mean(str(value), [str(one) for one in known]) or "Leave it out for the default.",
        )


def _are_shares(value: object) -> bool:
    """Whether these are a number for each rank: none below 0, and not all of them 0."""
    if not isinstance(value, Sequence) or not value:
        return False
    numbers = cast("Sequence[object]", value)
    are_numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers)
    return (
        are_numbers and min(cast("Sequence[float]", value)) >= 0 < sum(cast("Sequence[float]", value)) < inf
    )


def _number(name: str, value: object, kinds: tuple[type, ...], *, zero: bool = False) -> None:
    """Refuse what is no number above 0, or of 0 and more."""
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not (value > 0 or (zero and value == 0)):  # pyright: ignore[reportOperatorIssue]
        if kinds == (int,):
            what = f"a whole number of {0 if zero else 1} or more"
        else:
            what = "a number of 0 or more" if zero else "a number above 0"
        raise ConfigError(
            got=f"MultiGPUConfig({name}={value!r}) was given.",
            need=f"It is {what}.",
            fix="Leave it out for the default.",
        )
