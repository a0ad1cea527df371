"""A folder is saved whole or not at all.

The new files are built in a hidden folder on the target's own file system, flushed to the disk, and
then renamed into place. Until the first rename the old files are untouched; from then on a small plan
lies beside the new files, so that a save which is killed between two renames is finished by the next
one (or by ``recover``). A hidden folder without a plan is an unfinished save and is thrown away.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pantheraml.checkpoint.disk_errors import disk_error_number, free_bytes, save_error
from pantheraml.checkpoint.folder_files import bytes_below, flush
from pantheraml.checkpoint.locks import hold, take

_BUILDING = ".pantheraml-saving-"
_LOCK = "lock"
# One save's weights: a single file, or shards with their index. An adapter and a full model may live
# in one folder, so each only ever replaces its own kind.
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def publish_folder(target: str | Path, bytes_needed: int = 0) -> Iterator[Path]:
    """Build the files of ``target`` in the folder that is yielded; they appear in ``target`` on success.

    ``target`` may exist and hold other things, which stay. Of an older save, files of the same name are
    replaced, and weight files that the new save lacks (stale shards, a stale index) are removed.

    Args:
        target: the folder to save to; made, with its parents, if missing.
        bytes_needed: what the save will write, 0 if unknown; refused early when the disk has less.

    Yields:
        An empty folder on the same file system as ``target``.

    Raises:
        SaveError: the disk is full or cannot be written; what was in ``target`` before is untouched.
    """
    target = Path(target).resolve()
    ensure_can_save(target, bytes_needed)
    written, waiting = 0, None
    try:
        with _locked_folder(_home(target)) as folder:
            files = folder / "files"
            files.mkdir()
            try:
                yield files
                _write_plan(folder, target)
            except BaseException:
                written = bytes_below(files)
                raise
            waiting = folder
            _finish(folder)
    except Exception as error:
        number = disk_error_number(error)
        if number is None:
            raise
        raise save_error(
            number, str(error), target, bytes_needed=bytes_needed, written=written, waiting=waiting
        ) from error


def ensure_can_save(target: str | Path, bytes_needed: int = 0) -> None:
    """Refuse before the expensive work what would fail after it; what killed saves left there goes first.

    Args:
        target: the folder that will be saved to; it need not exist.
        bytes_needed: what the save will write, 0 if unknown.

    Raises:
        SaveError: ``target`` cannot be made or written, or its disk has less than ``bytes_needed`` free.
    """
    target = Path(target).resolve()
    try:
        place = next(path for path in (target, *target.parents) if path.exists())
        # Permission bits say too little (root squash, read-only mounts): make something for real.
        _try_out(place)
        recover(target)
    except OSError as error:
        raise save_error(error.errno, str(error), target, bytes_needed=bytes_needed) from error
    if bytes_needed > free_bytes(target):
        raise save_error(None, "the disk is too small", target, bytes_needed=bytes_needed)


def recover(target: str | Path) -> None:
    """Finish a save to ``target`` that was killed while its files were renamed into place, if there is one.

    Every save does this first; a loader may. Unfinished files of killed saves are removed on the way.
    """
    target = Path(target).resolve()
    for home in (target.parent, target):
        _clean(home)


def _home(target: Path) -> Path:
    """The folder to build in: beside the target, or inside it where a rename from beside is impossible."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent
    if target.is_mount():
        return target
    try:
        _try_out(target.parent)
    except OSError:
        return target
    return target.parent


def _try_out(place: Path) -> None:
    """Make a folder there, and remove it.

    Raises:
        OSError: none can be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=place))
    with suppress(OSError):  # another save's cleaning takes it for a leftover
        folder.rmdir()


@contextmanager
def _locked_folder(home: Path) -> Iterator[Path]:
    """A new hidden folder, locked while its process lives; it stays only with an unfinished plan."""
    while True:
        folder = home / f"{_BUILDING}{secrets.token_hex(6)}"
        folder.mkdir()
        with suppress(FileNotFoundError):  # another save's cleaning took it before it was locked
            lock = hold(folder / _LOCK)
            break
    try:
        yield folder
    finally:
        os.close(lock)
        if not (folder / "plan.json").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _clean(home: Path) -> None:
    """Finish or remove what killed processes left in ``home``; folders of living ones are locked."""
    for folder in home.glob(f"{_BUILDING}*"):
        with suppress(OSError):  # not ours to touch, or gone
            lock = take(folder / _LOCK)
            if lock is None:
                continue
            try:
                if (folder / "plan.json").exists():
                    _finish(folder)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _write_plan(folder: Path, target: Path) -> None:
    """Flush the new files, then the list of them: from here on the save is complete, wherever it lies."""
    files = folder / "files"
    names = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
    for name in names:
        if (target / name).is_dir():
            raise IsADirectoryError(21, "a folder lies where a file belongs", str(target / name))
        flush(files / name)
    for path in (files, *(path for path in files.rglob("*") if path.is_dir())):
        flush(path)
    plan = {"target": os.path.relpath(target, folder.parent), "files": names}
    draft = folder / "plan.draft"
    draft.write_text(json.dumps(plan), encoding="utf-8")
    flush(draft)
    draft.replace(folder / "plan.json")
    flush(folder)


def _finish(folder: Path) -> None:
    """Rename the planned files into the target, then remove the weights they replace; may be repeated."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    target = folder.parent / plan["target"]
    for name in plan["files"]:
        source = folder / "files" / name
        if source.exists():  # else an attempt that was killed has already moved it
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            source.replace(target / name)
    for stale in _superseded(target, plan["files"]):
        stale.unlink()
    if target.is_dir():
        flush(target)
    (folder / "plan.json").unlink()


def _superseded(target: Path, names: list[str]) -> list[Path]:
    """Weight files in ``target`` of the same kind and sub-folder as new ones, but not among them."""
    kinds = {(Path(name).parent, kind[1]) for name in names if (kind := _WEIGHTS.fullmatch(Path(name).name))}
    return [
        path
        for parent, adapter in kinds
        for path in (target / parent).iterdir()
        if (old := _WEIGHTS.fullmatch(path.name))
        and old[1] == adapter
        and str(parent / path.name) not in names
    ]
