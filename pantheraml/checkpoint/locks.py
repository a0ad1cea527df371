"""Files that a living process holds: what a killed one leaves can be told from what is in use."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def hold(path: Path) -> int:
    """Make the file and lock it until the handle that is returned is closed, or this process ends.

    On a file system without locks the file is held by nobody; what is left there stays.

    Raises:
        OSError: the file cannot be made, or its folder has gone.
    """
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return lock
        os.close(lock)  # it was taken for a leftover, and removed, before it was locked


def take(path: Path) -> int | None:
    """Lock the file, made if missing, of a process that has ended; None while it lives.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock
