"""``initialize_distributed``: who has a say in how a run is spread agrees, and the ranks know of one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.distributed.process_group import settings_of_run, setup_multi_gpu
from pantheraml.errors import ConfigError
from pantheraml.launch.accelerate import launched_precision, launched_wrapper
from pantheraml.models.zero3 import launched_stage

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

T = TypeVar("T")
_LAUNCHER = "accelerate launch or args.deepspeed"


def initialize_distributed(
    strategy: str = "auto",
    zero_stage: int | None = None,
    args: TrainingArguments | None = None,
    **settings: Any,
) -> Accelerator:
    """Be one of the ranks of a run with ``strategy``; before or after anything else, once or again.

    Started by plain ``python``, the process starts one rank for each GPU, which run the script from its beginning, and
    does not come back from here, as with ``setup_multi_gpu``. Models and trainers that come later follow ``strategy``.

    Args:
        strategy: as ``MultiGPUConfig.strategy``: ``"ddp"``, ``"deepspeed"``, ``"fsdp"``, ...; ``"auto"`` is what the
            arguments or the launcher say.
        zero_stage: of DeepSpeed, 0 to 3; None is what the launcher says, or 2.
        args: training arguments, made those of this rank in place; they say the precision. None takes that of our
            default arguments.
        settings: other fields of ``MultiGPUConfig``.

    Returns:
        An accelerator of the state that the trainer will use: processes, device, kind of ranks, precision.

    Raises:
        ConfigError: the arguments, the launcher, an earlier call, or what is asked for here contradict one another.
        HardwareError: DeepSpeed is not installed.
    """
    _check_launcher(args)
    config = _agreed(config_of({"strategy": strategy, **settings}), zero_stage, args)
    config = setup_multi_gpu(config_of({**vars(config), **settings}))
    # After the ranks were started: a process that starts them needs none of the heavy libraries.
    from pantheraml.training.accelerator import build_accelerator

    return build_accelerator(config, args)


def _agreed(asked: MultiGPUConfig, zero_stage: int | None, args: TrainingArguments | None) -> MultiGPUConfig:
    """The settings of the run so far, with the strategy that everybody who has a say agrees on.

    Raises:
        ConfigError: they do not.
    """
    before, launched = settings_of_run(), launched_stage(args)
    ways = {
        "initialize_distributed": asked.way,
        "multi_gpu_strategy of the arguments": getattr(args, "multi_gpu_strategy", "auto"),
        "an earlier call": before.way,
        _LAUNCHER: "auto" if launched is None else "deepspeed",
    }
    way = _only("strategy", {who: said for who, said in ways.items() if said != "auto"}) or "auto"
    if way == "deepspeed":
        stages = {
            "initialize_distributed": zero_stage,
            "an earlier call": before.zero_stage if before.way == way else None,
            _LAUNCHER: launched,
        }
        stage = _only("zero_stage", {who: said for who, said in stages.items() if said is not None})
        return config_of(
            {**vars(before), "strategy": way, "zero_stage": asked.zero_stage if stage is None else stage}
        )
    if zero_stage is not None:
        raise ConfigError(
            got=f"initialize_distributed got zero_stage={zero_stage!r}, and strategy={way!r}.",
            need="It is a setting of DeepSpeed.",
            fix='Write strategy="deepspeed", or leave zero_stage out.',
        )
    return config_of({**vars(before), "strategy": way})


def _only(name: str, said: Mapping[str, T]) -> T | None:
    """The value of ``name`` that all say; None if nobody says one."""
    values = list(said.items())
    for who, value in values[1:]:
        first, known = values[0]
        if value != known:
            raise ConfigError(
                got=f"{first} says {name}={known!r}; {who} says {value!r}.",
                need=f"A run has one {name}.",
                fix="Say it in one place. cleanup_multi_gpu() ends a run before another one.",
            )
    return values[0][1] if values else None


def _check_launcher(args: TrainingArguments | None) -> None:
    """Refuse what ``accelerate launch`` was told, and this package or ``args`` do otherwise."""
    wrapper, launched, written = launched_wrapper(), launched_precision(), None
    if wrapper is not None:
        raise ConfigError(
            got=f"accelerate launch was told to wrap models by its own {wrapper}.",
            need="The strategy wraps them.",
            fix='Start by accelerate launch --multi_gpu; strategy="fsdp" shares weights out.',
        )
    if args is not None:
        written = "fp16" if args.fp16 else "bf16" if args.bf16 else None
    if written is not None and launched not in (None, written):
        raise ConfigError(
            got=f"The arguments say {written}=True; accelerate launch was told --mixed_precision={launched}.",
            need="A run has one precision.",
            fix=f"Leave one of them out, or write --mixed_precision={written}.",
        )
