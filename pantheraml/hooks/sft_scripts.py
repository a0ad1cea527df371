"""The trainer that a script's ``SFTTrainer(...)`` becomes: TRL's arguments and rows, our ranks and steps."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path

from pantheraml.config.multi_gpu import Recompute
from pantheraml.distributed.process_group import group_size
from pantheraml.errors import ConfigError
from pantheraml.hooks.same_weights import SameWeights
from pantheraml.hooks.settings import HookSettings
from pantheraml.models.split import is_split
from pantheraml.models.state import get_state
from pantheraml.training.arguments import set_recompute_argument
from pantheraml.training.distributed import PantheraMLDistributedTrainer
from pantheraml.training.rows import Rows

# What a class of the script may replace of the trainer, after which a step is no longer known to be the plain one.
_OF_A_STEP = ("compute_loss", "training_step")


class HookedSFTTrainer(PantheraMLDistributedTrainer):
    """``PantheraMLDistributedTrainer`` for scripts that were written for ``trl.SFTTrainer``.

    It takes what that takes, a model by its name, too. Rows are prepared by TRL alone, and
    a plain model is trained as it is: nothing is recognised, attached or fused.

    Args:
        hook_settings: of ``enable_multi_gpu``.
        model: a model, or its name.
        args: SFTConfig or TrainingArguments; None: TRL's defaults. Never changed.
        processing_class: the tokenizer.
        quantization_config: for a model that is named.
        given: everything else that ``SFTTrainer`` or ``PantheraMLTrainer`` takes.

    Raises:
        ConfigError: settings that contradict each other, or a model that lies on several GPUs.
    """

    def __init__(
        self,
        *,
        hook_settings: HookSettings,
        model: Any,
        processing_class: PreTrainedTokenizerBase,
        args: TrainingArguments | None = None,
        quantization_config: Any = None,
        **given: Any,
    ) -> None:
        args = arguments_for(args, model, hook_settings)
        if isinstance(model, str):
            model = loaded(model, args, quantization_config)
        check_place(model)
        self._asked_recompute: bool | Recompute | None = hook_settings.enable_gradient_checkpointing
        self.repeats_steps = hook_settings.enable_memory_optimization
        super().__init__(
            model, args, multi_gpu_config=hook_settings.multi_gpu, processing_class=processing_class, **given
        )
        if hook_settings.debug and self._strategy.name in SameWeights.STRATEGIES:
            self.add_callback(SameWeights())

    def _wanted_recompute(self, args: TrainingArguments | None) -> bool | Recompute | None:
        return super()._wanted_recompute(args) if self._asked_recompute is None else self._asked_recompute

    def _recognised(self, train: Rows, evaluation: Any, tokenizer: Any, text_field: str) -> tuple[Rows, Any]:
        """The rows as they are: what the script gives is what TRL reads."""
        return train, evaluation

    def _loss_is_plain(self) -> bool:
        """As ``StepLoss``; a script's own class may compute another loss."""
        return not replaced_of_a_step(type(self)) and super()._loss_is_plain()

    def _why_not_merged(self, *, forced: bool) -> str | None:
        replaced = replaced_of_a_step(type(self))
        if replaced:
            return f"{type(self).__name__} has a {replaced[0]} of its own"
        return super()._why_not_merged(forced=forced)


def replaced_of_a_step(kind: type) -> list[str]:
    """Methods of a training step that a script's class has of its own."""
    return [name for name in _OF_A_STEP if getattr(kind, name) is not getattr(HookedSFTTrainer, name)]


def arguments_for(args: TrainingArguments | None, model: Any, settings: HookSettings) -> TrainingArguments:
    """The script's arguments with what ``enable_multi_gpu`` says instead; a copy."""
    if args is None:
        found: TrainingArguments = SFTConfig(f"{name_of(model).split('/')[-1]}-SFT")  # as TRL calls it
    else:
        found = copy.copy(args)
    if settings.batch_size_per_gpu is not None:
        found.per_device_train_batch_size = settings.batch_size_per_gpu
    if settings.recomputes is not None:
        set_recompute_argument(found, settings.recomputes)
    if found.world_size == 1 and found.n_gpu > 1:  # pragma: no cover - needs GPUs
        found._n_gpu = 1  # one rank has one GPU; transformers would put its model on all of them in turn
    return found


def name_of(model: Any) -> str:
    """The name or folder that a model was, or is to be, loaded from; empty for one that was made here."""
    return model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")


def loaded(name: str, args: TrainingArguments, quantization_config: Any) -> nn.Module:
    """The model of that name, as TRL loads it; ranks have it whole, each on its own GPU."""
    set_seed(args.seed)
    init = dict(getattr(args, "model_init_kwargs", None) or {})
    if quantization_config is not None:
        if "quantization_config" in init:
            raise ConfigError(
                got="quantization_config was given to the trainer and in model_init_kwargs.",
                need="A model is quantised in one way.",
                fix="Keep the argument of the trainer.",
            )
        init["quantization_config"] = quantization_config
    init.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    if group_size() > 1 or "device_map" not in init:
        init["device_map"] = None
    return create_model_from_path(name, **init)


def check_place(model: Any) -> None:
    """Refuse a model that transformers has put on several GPUs: each rank has one of its own."""
    if group_size() > 1 and is_split(model) and get_state(model) is None:
        raise ConfigError(
            got=f"Each of {group_size()} ranks has loaded the model onto several GPUs.",
            need="Each rank trains a model on the GPU that it has to itself.",
            fix="Leave device_map out of from_pretrained.",
        )
