"""The adapter that a trainer attaches where nothing else says what is trained."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from pantheraml.log import say
from pantheraml.models.adapters import has_adapter
from pantheraml.models.state import ModelState


def ensure_adapter(model: Any, state: ModelState) -> Any:
    """Attach a default LoRA adapter to a model that has none; a later trainer of the model goes on with it."""
    if isinstance(model, PeftModel):
        return model
    if state.with_adapter is not None and has_adapter(model):
        return state.with_adapter
    say(
        "this model has no adapter, so LoRA r=16 is attached to its projections; call get_peft_model for other "
        "settings, or load with full_finetuning=True to train all weights."
    )
    from pantheraml.fast_model import FastLanguageModel

    return FastLanguageModel.get_peft_model(model)
