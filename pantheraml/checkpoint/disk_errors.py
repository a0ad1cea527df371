"""Failures of the disk as errors that say what to do.

Python raises ``OSError``; the Rust writers (safetensors, tokenizers) raise errors of their own whose
text ends in ``(os error 28)``; torch's writer says that a write failed and not why.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from pantheraml.errors import SaveError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_WRONG_PATH = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
# What torch.save says when a write failed.
_TORCH_WRITER = re.compile(r"iostream error|unexpected pos|PytorchStreamWriter failed")
_PAGE = 4096  # a disk with less free than this is full
_KNOWN = _FULL | _FORBIDDEN | _WRONG_PATH | {errno.EFBIG, errno.EIO, errno.EXDEV, errno.ESTALE}


def disk_error_number(error: BaseException) -> int | None:
    """The ``errno`` of a failed write, ``None`` when ``error`` is about something else."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _KNOWN else None
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found:
        return int(found[1])
    return errno.EIO if _TORCH_WRITER.search(str(error)) else None


def free_bytes(target: Path) -> int:
    """What this user may still write on the disk of ``target`` (or of its nearest existing parent)."""
    return shutil.disk_usage(_there(target)).free


def _there(target: Path) -> Path:
    """``target``, or its nearest parent that exists."""
    return next(path for path in (target, *target.parents) if path.exists())


def save_error(
    number: int | None,
    text: str,
    target: Path,
    *,
    bytes_needed: int = 0,
    written: int = 0,
    waiting: Path | None = None,
) -> SaveError:
    """The ``SaveError`` for a disk failure.

    Args:
        number: the ``errno``; ``None`` when free space was found too small beforehand.
        text: the original message.
        target: the folder that was to be saved.
        bytes_needed: size of the whole save in bytes, 0 if unknown.
        written: bytes written before the failure.
        waiting: the folder with the complete new files, when only moving them into place failed.
    """
    if number == errno.EIO and free_bytes(target) < _PAGE:
        number = errno.ENOSPC
    if _TORCH_WRITER.search(text):
        text = "torch.save could not write"
    # Not the numbers of errors, nor the hidden folder that the user did not name.
    text = re.sub(r"^\[Errno \d+\] | ?\(os error \d+\)", "", text)
    text = re.sub(r": '[^']*/\.(pantheraml-saving|unfinished-checkpoint)-[^']*'", "", text)
    reason = text if number is None or os.strerror(number) in text else f"{os.strerror(number)}: {text}"
    got = f"Saving to {target} stopped: {reason}."
    kept = f"Whatever {target} held before is untouched, and nothing half-written is left."
    if waiting is not None:
        kept = f"The new files are complete; those not yet in place wait in {waiting} for the next save."
    if number is None or number in _FULL:
        space = f"{size_text(free_bytes(target))} is free there."
        if number is None or written:
            size = size_text(bytes_needed if number is None else written)
            space = f"The save {'needs' if number is None else 'had written'} {size} and {space}"
        fix = "Free some space or save to a folder on another disk; `df -h` lists the disks."
        return SaveError(got, f"{space} {kept}", fix)
    if number in _FORBIDDEN:
        need = f"The folder must be writable for {_user()}. {kept}"
        fix = f"Save to a folder of your own, or type `ls -ld {_there(target)}` to see whose it is."
        return SaveError(got, need, fix)
    if number in _WRONG_PATH:
        fix = "Give another folder name, or move what lies in the way."
        return SaveError(got, f"A folder is needed, and every part of its path must be one. {kept}", fix)
    if number == errno.EFBIG:
        need = f"This file system or process (`ulimit -f`) does not allow files that large. {kept}"
        return SaveError(got, need, "Pass a smaller max_shard_size (such as '1GB'), or raise the limit.")
    return SaveError(got, kept, "Save to a folder on another disk.")


def size_text(count: int) -> str:
    """``count`` bytes in the unit that reads best."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _user() -> str:
    return f"user {os.geteuid()}"
