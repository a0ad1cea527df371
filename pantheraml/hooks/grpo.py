"""``enable_grpo_support``: a script's ``trl.GRPOTrainer`` is ``PantheraMLGRPOTrainer``, on one GPU and on several.

    trl.GRPOTrainer.__init__     a trainer of a script becomes one of ours before it is built
    trl.GRPOConfig.__post_init__ a generation holds whole groups, or it is said what to type; a named server is asked

Ranks are started by ``enable_multi_gpu``, or by torchrun, accelerate launch or srun.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, cast

from trl import GRPOConfig, GRPOTrainer

from pantheraml.devices.inventory import num_gpus
from pantheraml.distributed.process_group import get_rank, group_size, join_early
from pantheraml.hooks.adoption import Constructor, by_name, changed, is_adopted
from pantheraml.hooks.enable import get_active_config
from pantheraml.hooks.grpo_scripts import HookedGRPOTrainer
from pantheraml.models.patching import PatchSet
from pantheraml.training.generators import ask_named_server
from pantheraml.training.grpo import PantheraMLGRPOTrainer
from pantheraml.training.grpo_batch import fill_groups


@dataclass
class _Support:
    """What is changed, and the classes of the trainers that became ours."""

    patches: PatchSet = field(default_factory=PatchSet)
    trainers: list[str] = field(default_factory=list[str])
    classes: dict[type, type] = field(default_factory=dict[type, type])

    def begin(self) -> None:
        for kind, name, instead in (
            (GRPOTrainer, "__init__", self._build),
            (GRPOConfig, "__post_init__", _plan),
        ):
            why = "trainers of scripts that are not ours"
            self.patches.set(kind, name, changed(getattr(kind, name), instead), why)

    def _build(
        self, original: Constructor, trainer: Any, args: tuple[Any, ...], given: dict[str, Any]
    ) -> None:
        kind, named = type(trainer), by_name(original, args, given)
        is_done = isinstance(trainer, PantheraMLGRPOTrainer) or named.get("model") is None
        if is_done or not is_adopted(trainer, GRPOTrainer, HookedGRPOTrainer, named, self.classes):
            original(trainer, *args, **given)
            return
        HookedGRPOTrainer.__init__(cast(Any, trainer), **named)
        settings = get_active_config()
        if settings is not None:
            cast(Any, trainer).repeats_steps = settings["enable_memory_optimization"]
        self.trainers.append(kind.__name__)


_support: _Support | None = None


def enable_grpo_support() -> dict[str, Any]:
    """Let a script's ``trl.GRPOTrainer`` train as ``PantheraMLGRPOTrainer`` does; see ``docs/grpo.md``.

    Trainers that are built from now on are ours. Where a ``GRPOConfig`` that is made from now on would cut groups, and
    nothing but its defaults says how large a generation is, its ``gradient_accumulation_steps`` is raised until it does
    not; a vLLM server that it names is asked. A second call does nothing.

    Returns:
        ``get_grpo_status()``.
    """
    global _support  # noqa: PLW0603
    if _support is None:
        support = _Support()
        support.begin()
        _support = support
    return get_grpo_status()


def disable_grpo_support() -> None:
    """Undo ``enable_grpo_support``: trainers that are built from now on are TRL's own; nothing where it is not enabled.

    Raises:
        ConfigError: another library has changed the same method since; nothing is undone then.
    """
    global _support  # noqa: PLW0603
    if _support is not None:
        _support.patches.revert()
        _support = None


def get_grpo_status() -> dict[str, Any]:
    """What is so at this moment, enabled or not.

    Returns:
        ``enabled``; ``trainers``: classes of the trainers that became ours, in order; ``changed``: what is changed of
        TRL; ``vllm_installed``: whether ``use_vllm=True`` can be asked for here; ``world_size``, ``rank``.
    """
    changes = [] if _support is None else _support.patches.report()
    return {
        "enabled": _support is not None,
        "trainers": [] if _support is None else list(_support.trainers),
        "changed": [f"{change.path}.{change.what.partition('=')[0]}" for change in changes],
        "vllm_installed": find_spec("vllm") is not None,
        "world_size": group_size(),
        "rank": get_rank(),
    }


def _plan(original: Constructor, config: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """A ``GRPOConfig`` of these ranks, whose generations hold whole groups, and whose vLLM server is asked."""
    join_early()
    config.use_cpu = config.use_cpu or num_gpus() == 0  # without it, ranks on CPUs do not know of one another
    fill_groups(config, group_size())
    ask_named_server(config)
    original(config, *args, **given)
