"""``run.json``: what a run was told, and what it has come to over all its starts, in plain text beside a checkpoint.

transformers keeps the arguments as a pickle, which nobody reads; totals of tokens, time and memory go on counting from
here when the run goes on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pantheraml.checkpoint.folder_files import read_ours
from pantheraml.checkpoint.manifest import library_versions, read_manifest
from pantheraml.errors import CheckpointError

NAME = "run.json"
_FORMAT = "pantheraml-run"


@dataclass(frozen=True)
class Totals:
    """What a run has come to, over all its starts.

    Attributes:
        tokens: trained on, of all ranks, without padding.
        seconds: of training.
        peak_allocated_gib: the most that a GPU of any rank held; None without GPUs.
    """

    tokens: int = 0
    seconds: float = 0.0
    peak_allocated_gib: float | None = None


def write_record(checkpoint: Path, settings: dict[str, Any], totals: Totals) -> None:
    """Write it into the folder of a checkpoint.

    Args:
        checkpoint: the folder.
        settings: sections of what the run was told; what JSON does not know is written as text.
        totals: so far.
    """
    said = {"format": _FORMAT, **settings, "totals": asdict(totals)}
    text = json.dumps(said, indent=1, default=str, skipkeys=True)
    (checkpoint / NAME).write_text(text + "\n", encoding="utf-8")


def read_totals(checkpoint: Path) -> Totals:
    """The totals of a checkpoint; zeros where it has none that can be read."""
    try:
        said = read_ours(checkpoint / NAME, _FORMAT)["totals"]
        peak = said["peak_allocated_gib"]
        return Totals(int(said["tokens"]), float(said["seconds"]), None if peak is None else float(peak))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return Totals()


def other_versions(checkpoint: Path) -> list[str]:
    """Libraries that are not as they were when a checkpoint was saved: ``torch 2.12.1 (here 2.13.0)``.

    Empty, too, where no manifest says what they were.
    """
    try:
        saved = read_manifest(checkpoint).libraries
    except CheckpointError:
        return []
    here = library_versions()
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    return [f"{name} {saved.get(name, 'missing')} (here {here.get(name, 'missing')})" for name in names]
