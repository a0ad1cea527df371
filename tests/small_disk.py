"""A real file system that is soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def small_disk(folder: Path, size: str, otherwise: Callable[[str], Any] = pytest.skip) -> Iterator[Path]:
    """A file system of ``size`` (such as 2m) on ``folder``, in memory; ``otherwise`` where that is not permitted."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        otherwise("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        # Lazily: a process that another test has forked meanwhile may still hold a file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
