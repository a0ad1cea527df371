"""What fails on one rank fails on all, at the same place: no rank waits for one that has given up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pantheraml.checkpoint.disk_errors import disk_error_number, save_error
from pantheraml.checkpoint.folder_files import bytes_below
from pantheraml.distributed.process_group import gather_objects
from pantheraml.errors import SaveError, first_line


class DiskRefused(SaveError):
    """A checkpoint that the disk of some rank did not take; the ones before it stay."""


class _Told(NamedTuple):
    """A failure, as another rank can be told: the parts of an error, and whether it is the disk's."""

    parts: tuple[str, str, str]
    of_disk: bool


@contextmanager
def agreeing(target: Path, unfinished: Path | None = None) -> Iterator[None]:
    """A part of a save that all ranks take; they leave it together, by the same kind of error if one of them fails.

    Args:
        target: the checkpoint that is saved.
        unfinished: the hidden folder that it is built in, or itself.

    Raises:
        DiskRefused: on every rank, if only disks failed.
        SaveError: on ranks beside one that failed otherwise, which raises its own error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks are waiting
        failure = _explained(error, target, unfinished)
    told = gather_objects(None if failure is None else _told(failure))
    found = [(rank, one) for rank, one in enumerate(told) if one is not None]
    if not found:
        return
    is_disk = all(one.of_disk for _, one in found)
    if failure is not None and isinstance(failure, DiskRefused) == is_disk:
        raise failure
    rank, one = next(pair for pair in found if pair[1].of_disk == is_disk)
    got, need, fix = one.parts
    raise (DiskRefused if is_disk else SaveError)(f"Rank {rank}: {got}", need, fix)


def _explained(error: Exception, target: Path, unfinished: Path | None) -> Exception:
    """``error``; a failure of the disk as one that says what to do."""
    number = disk_error_number(error)
    if isinstance(error, SaveError):
        said = error
    elif number is not None:  # before space is freed
        written = 0 if unfinished is None else bytes_below(unfinished)
        said = save_error(number, str(error), target, written=written)
    else:
        return error
    parts = (said.got, said.need, said.fix)
    if unfinished is not None:  # which the user did not name
        parts = (part.replace(str(unfinished / target.name), str(target)) for part in parts)
    refused = DiskRefused(*parts)
    refused.__cause__ = error
    return refused


def _told(failure: Exception) -> _Told:
    if isinstance(failure, DiskRefused):
        return _Told((failure.got, failure.need, failure.fix), of_disk=True)
    return _Told((f"{type(failure).__name__}: {first_line(failure)}.", "", ""), of_disk=False)
