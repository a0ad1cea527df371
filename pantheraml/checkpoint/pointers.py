"""``latest.json`` and ``best.json``: which checkpoint of a run is which."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pantheraml.checkpoint.disk_errors import disk_error_number, save_error
from pantheraml.checkpoint.folder_files import read_ours, reason_of, replace_text
from pantheraml.checkpoint.names import checkpoint_name
from pantheraml.errors import CheckpointError

LATEST, BEST = "latest", "best"
POINTERS = (LATEST, BEST)
_FORMAT = "pantheraml-pointer"


@dataclass(frozen=True)
class Pointer:
    """What a pointer says.

    Args:
        checkpoint: the name of a folder beside the pointer.
        step: of that checkpoint.
        metric: what makes it the best, if it is.
        value: of the metric.
    """

    checkpoint: str
    step: int
    metric: str | None = None
    value: float | None = None


def pointer_path(run_folder: Path, which: str) -> Path:
    """The file of ``latest`` or ``best``."""
    return run_folder / f"{which}.json"


def point(
    run_folder: Path,
    which: str,
    step: int,
    *,
    metric: str | None = None,
    value: float | None = None,
    must_exist: bool = True,
) -> Pointer:
    """Let ``latest`` or ``best`` name the checkpoint of ``step``.

    Args:
        run_folder: the run's folder.
        which: ``latest`` or ``best``.
        step: of the checkpoint.
        metric: what makes it the best.
        value: of the metric.
        must_exist: refuse to name a checkpoint that is not there.

    Raises:
        CheckpointError: there is no such checkpoint.
        SaveError: the disk is full or cannot be written; the pointer still says what it said.
    """
    pointer = Pointer(checkpoint_name(step), step, metric, None if value is None else float(value))
    path = pointer_path(run_folder, which)
    if must_exist:
        _ensure_there(path, pointer)
    said: dict[str, Any] = {"format": _FORMAT, "checkpoint": pointer.checkpoint, "step": step}
    if metric is not None:
        said |= {"metric": metric, "value": pointer.value}
    try:
        replace_text(path, json.dumps(said) + "\n")
    except OSError as error:
        number = disk_error_number(error)
        if number is None:
            raise
        raise save_error(number, reason_of(error), path) from error
    return pointer


def read_pointer(run_folder: Path, which: str, *, must_exist: bool = True) -> Pointer | None:
    """What ``latest`` or ``best`` names; None where there is no such file.

    Args:
        run_folder: the run's folder.
        which: ``latest`` or ``best``.
        must_exist: refuse a pointer whose checkpoint is gone.

    Raises:
        CheckpointError: the pointer is damaged, foreign or unreadable, or its checkpoint is gone.
    """
    path = pointer_path(run_folder, which)
    try:
        pointer = _pointer(read_ours(path, _FORMAT))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({reason_of(error)})" if isinstance(error, OSError) else error
        raise CheckpointError(
            f"'{path}' {reason}.",
            'It names a checkpoint of this folder, as in {"checkpoint": "checkpoint-7", "step": 7}.',
            "Remove the file; the newest whole checkpoint is used then, and the next save writes it anew.",
        ) from None
    if must_exist:
        _ensure_there(path, pointer)
    return pointer


def _ensure_there(path: Path, pointer: Pointer) -> None:
    if not (path.parent / pointer.checkpoint).is_dir():
        raise CheckpointError(
            f"'{path}' names {pointer.checkpoint}, and there is no such folder beside it.",
            "A pointer names a checkpoint that is there.",
            f"Bring {pointer.checkpoint} back, or remove {path.name}.",
        )


def _pointer(said: dict[str, Any]) -> Pointer:
    """The pointer of a file's content.

    Raises:
        ValueError: what is wrong, as the rest of a sentence that begins with the file's name.
    """
    name, step, metric, value = (said.get(key) for key in ("checkpoint", "step", "metric", "value"))
    if type(step) is not int or name != checkpoint_name(step):
        raise ValueError("names no checkpoint of its folder")
    if not isinstance(metric, str | None) or not isinstance(value, float | int | None):
        raise ValueError("names a best value that is no number")
    return Pointer(checkpoint_name(step), step, metric, value)
