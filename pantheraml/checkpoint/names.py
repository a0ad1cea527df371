"""The names of a run's checkpoints, and the hidden ones beside them."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

MANIFEST = "manifest.json"
# The folder of an optimizer's state, in a checkpoint to which every rank adds its part.
OPTIMIZER = "optimizer"
# A save that is under way, or was killed.
UNFINISHED = ".unfinished-"
# What is thrown away; it may be removed at any time.
REMOVED = ".removed-"


def checkpoint_name(step: int) -> str:
    """What the checkpoint of ``step`` is called; transformers calls it so, too."""
    return f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None if it is no such name."""
    found = re.fullmatch(r"checkpoint-([0-9]{1,18})", name)
    return int(found[1]) if found else None


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, by step; hidden folders are none.

    Raises:
        OSError: the folder cannot be listed.
    """
    if not run_folder.is_dir():
        return []
    found = [(step, path) for path in run_folder.iterdir() if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def hidden_name(prefix: str, name: str) -> str:
    """A name for something that stands for ``name``, which nothing else has."""
    return f"{prefix}{name}-{secrets.token_hex(4)}"
