"""A checkpoint of a run that cannot be finished leaves no trace; the ones before it stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pantheraml.checkpoint.disk_errors import disk_error_number, save_error


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove ``folder`` when the block that fills it fails, unless it was there before.

    Args:
        folder: the checkpoint that is being written.

    Raises:
        SaveError: the disk is full or cannot be written.
    """
    existed = folder.exists()
    try:
        yield
    except BaseException as error:
        number = disk_error_number(error)
        explained = (
            None if number is None else save_error(number, str(error), folder)
        )  # before space is freed
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if explained is None:
            raise
        raise explained from error
