"""PantheraML: fine-tune language models; every GPU you have trains it.

Importing this package loads nothing heavy, sets no environment variable and patches nothing.
Each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pantheraml.version import __version__

_EXPORTS: dict[str, str] = {
    "FastLanguageModel": "fast_model",
    "FastModel": "fast_model",
    "PantheraMLTrainer": "training.trainer",
    "PantheraMLTrainingArguments": "training.arguments",
    "UnslothTrainer": "training.trainer",
    "UnslothTrainingArguments": "training.arguments",
    "get_chat_template": "data.chat_templates",
    "is_bfloat16_supported": "devices.inventory",
    "standardize_data_formats": "data.conversations",
    "standardize_sharegpt": "data.conversations",
    "to_sharegpt": "data.conversations",
    "train_on_responses_only": "data.masking",
}

if TYPE_CHECKING:
    from pantheraml.data.chat_templates import get_chat_template
    from pantheraml.data.conversations import standardize_data_formats, standardize_sharegpt, to_sharegpt
    from pantheraml.data.masking import train_on_responses_only
    from pantheraml.devices.inventory import is_bfloat16_supported
    from pantheraml.fast_model import FastLanguageModel, FastModel
    from pantheraml.training.arguments import PantheraMLTrainingArguments, UnslothTrainingArguments
    from pantheraml.training.trainer import PantheraMLTrainer, UnslothTrainer

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "PantheraMLTrainer",
    "PantheraMLTrainingArguments",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "__version__",
    "get_chat_template",
    "is_bfloat16_supported",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'pantheraml' has no attribute {name!r}")
    value = getattr(import_module(f"pantheraml.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
