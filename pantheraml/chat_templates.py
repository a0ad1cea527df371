"""The data functions under the module name that existing scripts import them from."""

from __future__ import annotations

from pantheraml.data.chat_templates import get_chat_template
from pantheraml.data.conversations import standardize_data_formats, standardize_sharegpt, to_sharegpt
from pantheraml.data.masking import train_on_responses_only

__all__ = [
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]
