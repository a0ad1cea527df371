"""Adapters that were saved: attached to their base model, whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pantheraml.errors import AdapterError, first_line
from pantheraml.models.source import read_json
from pantheraml.models.state import patches_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Attach the saved adapter of ``folder``, trainable.

    Raises:
        AdapterError: the adapter lacks weights this model would need, or has others.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from pantheraml.models import sharding
    from pantheraml.models.tensor_plan import check_adapter_settings, share_factors

    vocabulary = _vocabulary_keys(model)
    settings = read_json(folder / "adapter_config.json")
    check_adapter_settings(model, settings)
    sharding.check_adapter_settings(model, settings)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            # PEFT 0.21 asks transformers 5.23 for the older of two names of one property.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _foreign(folder, model, first_line(error)) from error
    # Left to itself, PEFT asks the hub whether the vocabulary was resized.
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    odd = sorted((expected - stored) | (stored - expected - vocabulary))
    if odd:
        raise _foreign(folder, model, f"{len(odd)} of its weights do not match, first {odd[0]}")
    sharding.place_adapter(wrapped)
    share_factors(wrapped, patches_of(model))
    return wrapped


def saved_vocabulary(model: PreTrainedModel, folder: Path) -> int | None:
    """Rows of the embedding that lies beside the adapter in ``folder``, None where there is none.

    PEFT saves embedding and head with an adapter whose model got another vocabulary.
    """
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        found = _vocabulary_keys(model) & set(file.keys())
        return file.get_slice(min(found)).get_shape()[0] if found else None


def _vocabulary_keys(model: PreTrainedModel) -> set[str]:
    """Names of whole embedding and head weights in an adapter's file."""
    whole = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is one for one in whole)]
    return {f"base_model.model.{name}{step}.weight" for name in names for step in ("", ".base_layer")}


def _foreign(folder: Path, model: PreTrainedModel, reason: str) -> AdapterError:
    return AdapterError(
        got=f"The adapter in '{folder}' does not fit the base model '{model.config.name_or_path}' ({reason}).",
        need="An adapter only fits the model it was trained on.",
        fix="Load it with that model: set 'base_model_name_or_path' in its adapter_config.json.",
    )
