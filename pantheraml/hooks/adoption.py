"""What is changed of other libraries while multi-GPU is enabled: two constructors, and nothing else.

    trl.SFTTrainer.__init__        a trainer of a script becomes one of ours before it is built
    transformers.Trainer.__init__  every other trainer is told the settings, or told why they cannot be

The instance changes its class, not the class its methods: whoever has imported ``SFTTrainer`` before, by whatever name,
has it, and a script's own class keeps all of its methods, which come before ours.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import trl
from transformers import AutoProcessor, PreTrainedTokenizerBase, Trainer, TrainingArguments

from pantheraml.devices.inventory import num_gpus
from pantheraml.distributed.process_group import group_size
from pantheraml.errors import ConfigError
from pantheraml.hooks.settings import HookSettings
from pantheraml.hooks.sft_scripts import HookedSFTTrainer, name_of
from pantheraml.log import say_once
from pantheraml.models.patching import PatchSet
from pantheraml.training.grpo import PantheraMLGRPOTrainer
from pantheraml.training.trainer import PantheraMLTrainer

Constructor = Callable[..., None]


class Adoption:
    """The changed constructors.

    Attributes:
        trainers: names of the classes of the trainers that became ours, in order.

    Args:
        settings: for trainers that are built from now on.
    """

    def __init__(self, settings: HookSettings) -> None:
        self.trainers: list[str] = []
        self._settings = settings
        self._classes: dict[type, type] = {}
        self._patches = PatchSet()

    def begin(self) -> None:
        """Change the constructors."""
        for kind, instead in ((trl.SFTTrainer, self._build_sft), (Trainer, self._build_other)):
            original = cast(Constructor, kind.__init__)
            why = "trainers of scripts that are not ours"
            self._patches.set(kind, "__init__", changed(original, instead), why)

    def end(self) -> None:
        """Give the constructors back: the same objects as before.

        Raises:
            ConfigError: somebody has changed one of them since; nothing is undone then.
        """
        self._patches.revert()

    def changes(self) -> list[str]:
        """What is changed, by name."""
        return [f"{change.path}.__init__" for change in self._patches.report()]

    def _build_sft(
        self, original: Constructor, trainer: Any, args: tuple[Any, ...], given: dict[str, Any]
    ) -> None:
        kind, named = type(trainer), by_name(original, args, given)
        if isinstance(trainer, PantheraMLTrainer) or named.get("model") is None:
            original(trainer, *args, **given)
            return
        if not is_adopted(trainer, trl.SFTTrainer, HookedSFTTrainer, named, self._classes):
            original(trainer, *args, **given)
            return
        HookedSFTTrainer.__init__(trainer, hook_settings=self._settings, **named)
        self.trainers.append(kind.__name__)

    def _build_other(
        self, original: Constructor, trainer: Any, args: tuple[Any, ...], given: dict[str, Any]
    ) -> None:
        name, arguments = type(trainer).__name__, by_name(original, args, given).get("args")
        if arguments is not None and not isinstance(trainer, PantheraMLTrainer):
            tell_other(name, arguments, self._settings)
            if group_size() > 1 and not isinstance(trainer, PantheraMLGRPOTrainer):
                say_once(
                    f"{name} trains on {group_size()} ranks as TRL and accelerate do it: steps that run out of memory "
                    "are not repeated, and nobody watches for hangs."
                )
        original(trainer, *args, **given)


def changed(original: Constructor, instead: Callable[..., None]) -> Constructor:
    """A constructor that hands ``original``, and what it was given, on to ``instead``."""

    @functools.wraps(original)
    def changed(self: Any, *args: Any, **given: Any) -> None:
        instead(original, self, args, given)

    return changed


def by_name(original: Constructor, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names; older ones that are given by name need not be the constructor's.

    Raises:
        TypeError: one is given twice, or there are too many.
    """
    names = list(inspect.signature(original).parameters)[1:]
    if len(args) > len(names):
        raise TypeError(f"{len(args)} arguments were given by place, and there are {len(names)}.")
    placed = dict(zip(names, args, strict=False))
    for name in placed.keys() & given.keys():
        raise TypeError(f"{name} was given by place and by name.")
    return {**placed, **given}


def is_adopted(trainer: Any, base: type, ours: type, named: dict[str, Any], known: dict[type, type]) -> bool:
    """Make a trainer that is about to be built one of ``ours``; or leave it to TRL, and say why.

    Args:
        trainer: of a class of TRL's or a script's; a script's gets ours behind itself.
        base: TRL's.
        ours: in its place.
        named: the constructor's arguments, to which the tokenizer is added.
        known: classes that were made before, by the script's; new ones are added.
    """
    kind = type(trainer)
    is_own = is_trls_own(kind, base)
    processing_class = None if is_own else processing_class_of(named)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        why = "has steps of its own" if is_own else "has a model that reads more than text"
        say_once(f"{kind.__name__} {why}, and is left to TRL.")
        return False
    if kind is not base and kind not in known:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        known[kind] = type(kind.__name__, (kind, ours), names)
    trainer.__class__ = ours if kind is base else known[kind]
    named["processing_class"] = processing_class
    return True


def is_trls_own(kind: type, base: type) -> bool:
    """Whether this is a class that TRL has derived from its ``base``."""
    return kind is not base and kind.__module__.split(".")[0] == "trl"


def processing_class_of(named: Mapping[str, Any]) -> Any:
    """What makes tokens of the rows of a trainer with these arguments: what was given, or what TRL would load."""
    for name in ("processing_class", "tokenizer"):
        if named.get(name) is not None:
            return named[name]
    model, args = named["model"], named.get("args")
    init = getattr(args, "model_init_kwargs", None) or {}
    return AutoProcessor.from_pretrained(
        name_of(model),
        revision=init.get("revision") if isinstance(model, str) else None,
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )


def tell_other(name: str, args: TrainingArguments, settings: HookSettings) -> None:
    """Let a trainer that stays TRL's have what it can of the settings.

    Args:
        name: of its class.
        args: its arguments, of which ``ddp_find_unused_parameters`` may be set.
        settings: of ``enable_multi_gpu``.

    Raises:
        ConfigError: the settings are others than the arguments, from which the trainer has derived others already.
    """
    ranks = group_size()
    if ranks > 1 and args.world_size == 1:
        need, fix = (
            "They were made before the ranks knew of one another.",
            "Call enable_multi_gpu before making them.",
        )
        if num_gpus() == 0:
            need, fix = "Ranks on CPUs have to be said.", "Pass use_cpu=True in the arguments."
        raise ConfigError(
            f"The arguments of {name} are those of one process, and this is one of {ranks} ranks.", need, fix
        )
    wanted = {
        "per_device_train_batch_size": ("batch_size_per_gpu", settings.batch_size_per_gpu),
        "gradient_checkpointing": ("enable_gradient_checkpointing", settings.recomputes),
    }
    for field, (argument, value) in wanted.items():
        if value is not None and getattr(args, field) != value:
            raise ConfigError(
                got=f"enable_multi_gpu({argument}={value}) was called, and {name} got {field}={getattr(args, field)}.",
                need=f"{argument} is set for SFTTrainer; {name} has planned with its own arguments by now.",
                fix=f"Write {field}={value} in its arguments, or leave {argument} out.",
            )
    if settings.find_unused_parameters and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True
