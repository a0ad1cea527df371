"""Room for checkpoints, models and temporary files."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pantheraml.devices.nvml import GIB
from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding
from pantheraml.errors import first_line

NAME = "disk"


@dataclass(frozen=True)
class Purpose:
    """What a folder is for.

    Attributes:
        name: of its row.
        least: bytes below which runs end with a full disk.
        enough: bytes below which that may come.
        fix: what to type when there is too little.
        is_written: runs write there; a cache of models that others fill may be read alone.
    """

    name: str
    least: int
    enough: int
    fix: str
    is_written: bool = True


PURPOSES = (
    Purpose(
        "current folder", GIB, 20 * GIB, "Type du -sh * to see what to remove, or pass another output_dir."
    ),
    Purpose(
        "model cache",
        GIB,
        20 * GIB,
        "Type hf cache ls to see what to remove, or export HF_HOME=/a/larger/disk.",
        is_written=False,
    ),
    Purpose("temporary files", GIB // 4, GIB, "Remove old files there, or export TMPDIR=/a/larger/disk."),
)


@dataclass(frozen=True)
class Place:
    """A folder.

    Attributes:
        folder: what is meant; it may not be there yet.
        free: bytes.
        failure: why nothing can be written there, as a clause, or None.
    """

    folder: Path
    free: int
    failure: str | None


def probe() -> tuple[Place, ...]:
    """Look at the folder for each of ``PURPOSES``."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return tuple(look_at(Path(folder)) for folder in (Path.cwd(), HF_HUB_CACHE, tempfile.gettempdir()))


def look_at(folder: Path) -> Place:
    """How much room there is, and whether a file can be written; in the folder above where it is not there yet."""
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    failure = None
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**20))
    except OSError as error:
        failure = first_line(error)
    return Place(folder, shutil.disk_usage(there).free, failure)


def judge(facts: tuple[Place, ...], purposes: tuple[Purpose, ...] = PURPOSES) -> list[Finding]:
    """A row for each folder."""
    return [_judge_place(place, purpose) for place, purpose in zip(facts, purposes, strict=True)]


def _judge_place(place: Place, purpose: Purpose) -> Finding:
    name = f"{NAME}: {purpose.name}"
    if place.failure is not None:
        seen = f"{place.folder} cannot be written: {place.failure}"
        return Finding(name, "bad" if purpose.is_written else "note", seen, purpose.fix)
    seen = f"{place.free / GIB:.1f} GiB free in {place.folder}"
    if place.free >= purpose.enough:
        return Finding(name, "ok", seen)
    return Finding(name, "bad" if place.free < purpose.least else "note", seen, purpose.fix)


CHECK = Check(NAME, probe, judge, if_it_fails="Type df -h . to see which disk does not answer.")
