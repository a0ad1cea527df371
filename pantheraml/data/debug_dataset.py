"""A small instruction data set inside the package, for first runs and tests without a network."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from pantheraml.errors import ConfigError

_FOLDER = Path(__file__).parent / "debug"
_SPLITS = ("train", "validation")


def load_debug_dataset(split: str = "train") -> Dataset:
    """The debug data set: short questions and answers with columns ``instruction``, ``input``, ``output``.

    Args:
        split: ``"train"`` or ``"validation"``; the second asks in other words for what the first teaches.

    Raises:
        ConfigError: another split.
    """
    if split not in _SPLITS:
        raise ConfigError(
            got=f"The debug data set has no split {split!r}.",
            need="It has 'train' and 'validation'.",
            fix="Choose one of them.",
        )
    lines = (_FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])
