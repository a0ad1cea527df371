"""The files below a folder: listed without following links, flushed, hashed; and small ones of ours."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pantheraml.checkpoint.locks import hold

DRAFT = ".draft"
_THREADS = 8  # hashing leaves the GIL; more threads than this only make a disk seek
Kind = Literal["file", "link", "other", "unreadable"]


@dataclass(frozen=True)
class Found:
    """What lies at a place below a folder; ``reason`` says why it cannot be read."""

    kind: Kind
    size: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """Size and SHA-256 of a file's contents."""

    size: int
    sha256: str


def files_below(folder: Path) -> dict[str, Found]:
    """Everything below ``folder`` but plain folders, by its path from there; no link is followed.

    Raises:
        OSError: ``folder`` itself cannot be listed.
    """
    found: dict[str, Found] = {}
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    name = f"{below}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{name}/")
                    else:
                        found[name] = _found(entry)
        except OSError as error:
            if not below:
                raise
            found[below.rstrip("/")] = Found("unreadable", reason=reason_of(error))
    return dict(sorted(found.items()))


def bytes_below(folder: Path) -> int:
    """The size of all files below ``folder``; 0 where they cannot be looked at."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0


def _found(entry: os.DirEntry[str]) -> Found:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError as error:
        return Found("unreadable", reason=reason_of(error))
    if stat.S_ISLNK(status.st_mode):
        return Found("link")
    return Found("file" if stat.S_ISREG(status.st_mode) else "other", status.st_size)


def measure(
    folder: Path, names: Iterable[str], *, flushed: bool = False
) -> tuple[dict[str, Measured], dict[str, OSError]]:
    """Size and SHA-256 of files, several at a time, none of them held in memory.

    Args:
        folder: where the files are.
        names: their paths from there.
        flushed: wait for each until it is on the disk.

    Returns:
        What was measured, and what could not be read, by name.
    """

    def one(name: str) -> Measured | OSError:
        try:
            return _measured(folder / name, flushed)
        except OSError as error:
            return error

    names = list(names)
    measured: dict[str, Measured] = {}
    failed: dict[str, OSError] = {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for name, result in zip(names, pool.map(one, names), strict=True):
            if isinstance(result, OSError):
                failed[name] = result
            else:
                measured[name] = result
    return measured, failed


def _measured(path: Path, flushed: bool) -> Measured:
    # Not blocking: whoever put a pipe there after the folder was listed must not stop a run.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb", buffering=0) as stream:  # noqa: PTH123
        if flushed:
            os.fsync(handle)
        return Measured(os.fstat(handle).st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk.

    Raises:
        OSError: it is not there, or the disk fails.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folders(folder: Path) -> None:
    """Wait until the names in ``folder``, and in all folders below it, are on the disk.

    Raises:
        OSError: the disk fails.
    """
    for path, _, _ in os.walk(folder, topdown=False):
        flush(Path(path))


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that there is always the old one or the new one, whole and on the disk.

    Raises:
        OSError: the disk is full or cannot be written; the old file stays, the draft goes.
    """
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}{DRAFT}")
    lock = hold(draft)
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    flush(path.parent)


def read_ours(path: Path, form: str) -> dict[str, Any]:
    """The content of a JSON file of ours, whose ``format`` is ``form``.

    Raises:
        ValueError: what is wrong, as the rest of a sentence that begins with the file's name.
        OSError: it is missing or unreadable.
    """
    if path.exists() and not path.is_file():
        raise ValueError("is no plain file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError("is damaged: it is no text") from None
    except (ValueError, RecursionError):
        raise ValueError("is damaged or was cut short: it is no JSON") from None
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError("was not written by PantheraML")
    return content


def shown(name: str) -> str:
    """A file's name as it can be printed everywhere."""
    return name if name.isprintable() else ascii(name)


def reason_of(error: OSError) -> str:
    """Why something failed, without numbers and paths."""
    return os.strerror(error.errno) if error.errno else str(error)
