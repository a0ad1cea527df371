"""The trainer that a script's ``GRPOTrainer(...)`` becomes: TRL's arguments, our ranks, samples and steps."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from pantheraml.hooks.sft_scripts import check_place, loaded, name_of
from pantheraml.training.grpo import PantheraMLGRPOTrainer


class HookedGRPOTrainer(PantheraMLGRPOTrainer):
    """``PantheraMLGRPOTrainer`` for scripts that were written for ``trl.GRPOTrainer``.

    It takes what that takes, a model by its name, too. A plain model is trained as it is: nothing is attached or fused.

    Args:
        model: a model, or its name.
        args: GRPOConfig; None: TRL's defaults. Never changed.
        processing_class: the tokenizer.
        quantization_config: for a model that is named.
        given: everything else that ``GRPOTrainer`` takes.

    Raises:
        ConfigError: settings that contradict each other, or a model that lies on several GPUs.
    """

    def __init__(
        self,
        *,
        model: Any,
        processing_class: PreTrainedTokenizerBase,
        args: GRPOConfig | None = None,
        quantization_config: Any = None,
        **given: Any,
    ) -> None:
        if args is None:
            args = GRPOConfig(f"{name_of(model).split('/')[-1]}-GRPO")  # as TRL calls it
        if isinstance(model, str):
            model = loaded(model, args, quantization_config)
        check_place(model)
        super().__init__(model, args=args, processing_class=processing_class, **given)
