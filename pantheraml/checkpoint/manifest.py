"""``manifest.json``: every file of a checkpoint with its size and SHA-256, and what the checkpoint is about.

It is the last file that is written. Its own text is under a SHA-256 too, so that no digit of it changes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from pantheraml.checkpoint.folder_files import (
    Found,
    Measured,
    files_below,
    flush_folders,
    measure,
    read_ours,
    reason_of,
    replace_text,
    shown,
)
from pantheraml.checkpoint.names import MANIFEST, step_of
from pantheraml.errors import CheckpointError, SaveError
from pantheraml.version import __version__

_FORMAT, _VERSION = "pantheraml-checkpoint", 1
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
# What loading a checkpoint takes by its name: beside a manifest that does not list it, it is another save's.
_LOADED = (
    "*model*.safetensors", "*model*.bin", "*.index.json", "config.json", "adapter_config.json", "trainer_state.json",
    "training_args.bin", "optimizer*", "scheduler*", "scaler.pt", "rng_state*", "*.distcp", ".metadata",
)  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Args:
        about: step, epoch, cursor, ranks and whatever else the run wrote.
        libraries: name -> version when it was saved.
        files: path from the checkpoint's folder -> size and SHA-256.
    """

    about: dict[str, Any]
    libraries: dict[str, str]
    files: dict[str, Measured] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files.values())


def write_manifest(
    folder: Path, about: dict[str, Any], measured: dict[str, Measured] | None = None
) -> Manifest:
    """Flush every file below ``folder``, list them, and write the list: from here on the checkpoint is whole.

    Args:
        folder: the checkpoint; nobody may write into it any more.
        about: step, epoch, cursor, ranks: what JSON can hold.
        measured: files that the ranks which wrote them have flushed and read already, by path from the folder.

    Raises:
        SaveError: a link or something else that is no plain file lies in the folder, or what other ranks have written
            is not there.
        OSError: a file cannot be read, or the disk cannot be written.
    """
    measured, below = measured or {}, files_below(folder)
    for name, file in measured.items():
        if name not in below or below[name].size != file.size:
            raise SaveError(
                f"Another rank has written {shown(name)} with {file.size:,} bytes, and rank 0 does not see it.",
                "Ranks that write one checkpoint need one folder for it, on a disk that all of them see.",
                "Give such an output_dir, or write save_on_each_node=True.",
            )
    names = []
    for name, found in below.items():
        if found.kind != "file":
            raise SaveError(
                f"'{folder / shown(name)}' is no plain file.",
                "A checkpoint is whole by itself: it holds plain files and folders, and no links.",
                "Write a copy of what it stands for, or write it elsewhere.",
            )
        if name != MANIFEST and name not in measured:
            names.append(name)
    files = dict(sorted({**measured, **measure_own(folder, names)}.items()))
    flush_folders(folder)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "about": about,
        "libraries": library_versions(),
        "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in files.items()},
    }
    content = json.loads(json.dumps(content))  # as a reader will see it
    replace_text(folder / MANIFEST, json.dumps({**content, "sha256": _seal(content)}, indent=1) + "\n")
    return Manifest(content["about"], content["libraries"], files)


def measure_own(folder: Path, names: Iterable[str]) -> dict[str, Measured]:
    """Size and SHA-256 of files that this process has written, once they are on the disk.

    Raises:
        OSError: one cannot be read.
    """
    files, failed = measure(folder, names, flushed=True)
    for error in failed.values():
        raise error
    return files


def read_manifest(folder: Path) -> Manifest:
    """What the manifest of ``folder`` says; the files are not looked at.

    Raises:
        CheckpointError: there is none, or it is cut short, changed, foreign or unreadable.
    """
    try:
        return _read(folder)
    except ValueError as error:
        raise CheckpointError(
            f"'{folder / MANIFEST}' {error}.",
            "It is written last and proves that a checkpoint is whole.",
            f"Use another checkpoint; `pantheraml verify {folder.parent}` says which are whole.",
        ) from None


def has_manifest(folder: Path) -> bool:
    """Whether ``folder`` has a manifest, whole or not."""
    return os.path.lexists(folder / MANIFEST)


def problems(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one sentence each; empty when it is what was saved.

    Files that neither the manifest nor a loader knows (notes, plots) are no problem.

    Args:
        folder: the checkpoint.
        hashes: read every file and compare its SHA-256; else sizes alone are compared.
    """
    try:
        found = files_below(folder)
    except OSError as error:
        return [f"{shown(folder.name)} cannot be read ({reason_of(error)})."]
    try:
        manifest = _read(folder)
    except ValueError as error:
        return [f"{MANIFEST} {error}."]
    wrong = _another_step(folder, manifest)
    same_size: list[str] = []
    for name, listed in manifest.files.items():
        problem = _problem(name, listed, found)
        if problem:
            wrong.append(f"{shown(name)} {problem}.")
        else:
            same_size.append(name)
    for name in found.keys() - manifest.files.keys():
        unreadable = found[name].kind == "unreadable"
        if unreadable or any(fnmatch(PurePosixPath(name).name, known) for known in _LOADED):
            wrong.append(f"{shown(name)} is not among the files that {MANIFEST} lists.")
    return sorted(wrong + (_changed(folder, manifest, same_size) if hashes else []))


def library_versions() -> dict[str, str]:
    """Versions of what trains, without importing any of it; a library that is missing is left out.

    CUDA's is that of the torch that is loaded, if one is.
    """
    versions = {"python": platform.python_version(), "pantheraml": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    cuda = None if torch is None else torch.version.cuda
    return versions if cuda is None else {**versions, "cuda": cuda}


def _read(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: what is wrong, as the rest of a sentence that begins with the file's name.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise ValueError("is a symbolic link, which no save leaves")
        content = read_ours(path, _FORMAT)
    except FileNotFoundError:
        raise ValueError("is missing: the save did not end, or the file was removed") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({reason_of(error)})") from None
    if content.get("version") != _VERSION:
        raise ValueError("has the layout of another version of PantheraML")
    seal = content.pop("sha256", None)
    if seal != _seal(content):
        raise ValueError("was changed after it was written")
    try:
        files = {
            name: Measured(int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()
        }
        return Manifest(dict(content["about"]), dict(content["libraries"]), files)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise ValueError("lacks entries that every manifest has") from None


def _seal(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _another_step(folder: Path, manifest: Manifest) -> list[str]:
    """A manifest that was copied from another step's folder."""
    named, step = step_of(folder.name), manifest.about.get("step")
    if None not in (named, step) and named != step:
        return [f"{MANIFEST} is of step {step}, not of {folder.name}."]
    return []


def _problem(name: str, listed: Measured, found: dict[str, Found]) -> str:
    """What is wrong with a listed file without reading it; empty if nothing."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == MANIFEST or "\0" in name:
        return f"is listed in {MANIFEST}, but lies outside of the checkpoint"
    parents = [str(parent) for parent in path.parents]
    if any(parent in found and found[parent].kind == "link" for parent in parents):
        return "lies behind a symbolic link, which no save leaves"
    unreadable = next(
        (one for one in (name, *parents) if one in found and found[one].kind == "unreadable"), None
    )
    if unreadable is not None:
        return f"cannot be read ({found[unreadable].reason})"
    if name not in found:
        return "is missing"
    file = found[name]
    if file.kind == "link":
        return "is a symbolic link, which no save leaves"
    if file.kind == "other":
        return "is no plain file"
    if file.size != listed.size:
        return f"has {file.size:,} bytes where {MANIFEST} lists {listed.size:,}"
    return ""


def _changed(folder: Path, manifest: Manifest, names: list[str]) -> list[str]:
    """Files whose contents are not those that were saved."""
    measured, failed = measure(folder, names)
    return [f"{shown(name)} cannot be read ({reason_of(error)})." for name, error in failed.items()] + [
        f"{shown(name)} was changed after it was saved: its SHA-256 is another."
        for name, file in measured.items()
        if file.sha256 != manifest.files[name].sha256
    ]
