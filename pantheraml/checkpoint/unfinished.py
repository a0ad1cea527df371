"""A checkpoint is built in a hidden folder beside the others and appears when it is whole.

``start_saving`` makes ``.unfinished-checkpoint-7-ab12cd34/checkpoint-7`` for all ranks to write into. ``publish``
writes the manifest, after which the checkpoint is complete, moves an older folder of its name into the hidden one,
and renames the new one into the run's folder. A process that is killed leaves the hidden folder, whose lock then is
free: ``recover`` ends what was complete and throws away what was not.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pantheraml.checkpoint.disk_errors import disk_error_number, save_error
from pantheraml.checkpoint.folder_files import DRAFT, Measured, bytes_below, flush, reason_of
from pantheraml.checkpoint.locks import hold, take
from pantheraml.checkpoint.manifest import Manifest, has_manifest, problems, write_manifest
from pantheraml.checkpoint.names import MANIFEST, REMOVED, UNFINISHED, checkpoint_name, hidden_name, step_of
from pantheraml.checkpoint.pointers import LATEST, POINTERS, point, pointer_path
from pantheraml.errors import SaveError

_LOCK = "lock"
_REPLACED = "replaced-"


@dataclass
class Unfinished:
    """A checkpoint that is being written by this process, and by others that were told ``folder``.

    Args:
        run_folder: where it will appear.
        step: of the run.
        home: the hidden folder.
        lock: held until the save ends.
    """

    run_folder: Path
    step: int
    home: Path
    lock: int | None

    @property
    def folder(self) -> Path:
        """Where the files belong; it is called as the checkpoint will be."""
        return self.home / checkpoint_name(self.step)

    @property
    def target(self) -> Path:
        """Where the checkpoint will appear."""
        return self.run_folder / checkpoint_name(self.step)

    @property
    def is_open(self) -> bool:
        """Whether it was neither published nor thrown away yet."""
        return self.lock is not None

    def close(self) -> None:
        """Give the lock back."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


@contextmanager
def saving(run_folder: str | Path, step: int) -> Iterator[Unfinished]:
    """``start_saving``, and ``discard`` when the block fails or ends without ``publish``.

    Yields:
        What ``publish`` takes; files go into its ``folder``.

    Raises:
        SaveError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    save = start_saving(run_folder, step)
    try:
        yield save
    except BaseException as error:
        explained = _explained(error, save)  # before space is freed
        if explained is None:
            raise
        raise explained from error
    finally:
        discard(save)


def start_saving(run_folder: str | Path, step: int) -> Unfinished:
    """Make the hidden folder of a new checkpoint; what killed saves left goes first. Rank 0 does this.

    Args:
        run_folder: the run's folder; made if missing.
        step: of the run.

    Raises:
        SaveError: the folder cannot be made or written.
    """
    run_folder = Path(run_folder).resolve()
    target = run_folder / checkpoint_name(step)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        recover(run_folder)
        while True:
            home = run_folder / hidden_name(UNFINISHED, target.name)
            # Another process may take a home without a lock for a leftover: then there is a next one.
            with suppress(FileNotFoundError):
                (home / target.name).mkdir(parents=True)
                return Unfinished(run_folder, step, home, hold(home / _LOCK))
    except OSError as error:
        raise save_error(error.errno, str(error), target) from error


def publish(save: Unfinished, about: dict[str, Any], measured: dict[str, Measured] | None = None) -> Manifest:
    """Let the checkpoint appear, and ``latest`` point to it. Rank 0 does this when every rank has written its files.

    Args:
        save: of ``start_saving``.
        about: epoch, cursor, ranks: what JSON can hold; the step is added.
        measured: as ``write_manifest``.

    Raises:
        SaveError: the disk is full or cannot be written, and what was there before is untouched; or the checkpoint is
            there and ``latest`` still names the one before.
    """
    try:
        manifest = write_manifest(save.folder, {**about, "step": save.step}, measured)
        _move_in(save.folder, save.target, save.home)
    except BaseException as error:
        with suppress(OSError):
            _move_back(save.home, save.target)
        stuck = not save.target.exists() and any(save.home.glob(f"{_REPLACED}*"))
        explained = _explained(error, save, waiting=save.home if stuck else None)
        if stuck:  # the next save ends this one: what it replaces lies in there, too
            save.close()
        discard(save)
        if explained is None:
            raise
        raise explained from error
    try:
        # It is there, unless another process that saves here is just replacing it.
        point(save.run_folder, LATEST, save.step, must_exist=False)
    finally:
        discard(save)
    return manifest


def discard(save: Unfinished) -> None:
    """Throw the hidden folder away; nothing happens when the save has ended already."""
    if save.is_open:
        take_away(save.home)
        save.close()


def recover(run_folder: str | Path) -> list[tuple[str, str]]:
    """End the saves of killed processes that were complete, and remove the others.

    Every save does this first, and so does whoever looks for a checkpoint to resume from.

    Returns:
        Names of hidden folders, and what happened to each as a sentence.
    """
    run_folder = Path(run_folder).resolve()
    done: list[tuple[str, str]] = []
    for leftover in sorted(run_folder.glob(f"{REMOVED}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for draft in run_folder.glob(f".*.json-*{DRAFT}"):
        if draft.name.startswith(tuple(f".{which}.json-" for which in POINTERS)):
            with suppress(OSError), _taken(draft) as is_free:
                if is_free:
                    draft.unlink(missing_ok=True)
    for home in sorted(run_folder.glob(f"{UNFINISHED}*")):
        said = "A save is under way in another process."
        try:
            killed_early = not (home / _LOCK).exists()
            with _taken(home / _LOCK) as is_free:
                if is_free:
                    said = _end(run_folder, home, killed_early)
        except OSError as error:  # not ours to touch, or a disk without locks
            said = f"An unfinished save could not be ended ({reason_of(error)})."
        done.append((home.name, said))
    return done


@contextmanager
def _taken(lock_file: Path) -> Iterator[bool]:
    """Hold the lock of a process that has ended; False while it lives."""
    lock = take(lock_file)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def take_away(folder: Path) -> None:
    """Remove a folder so that a half-removed one is never taken for a checkpoint: it loses its name first."""
    hidden = folder.with_name(hidden_name(REMOVED, folder.name.lstrip(".")))
    try:
        folder.rename(hidden)
        flush(folder.parent)
    except FileNotFoundError:
        return
    except OSError:
        hidden = folder if folder.name.startswith(".") else hidden  # a full disk may refuse even names
    shutil.rmtree(hidden, ignore_errors=True)


def _end(run_folder: Path, home: Path, killed_early: bool) -> str:
    """What becomes of a killed process's save, told as a sentence."""
    name = home.name.removeprefix(UNFINISHED).rpartition("-")[0]
    step, folder, target = step_of(name), home / name, run_folder / name
    if step is None:
        return "This is no save of PantheraML, and was left as it is."
    if folder.is_dir() and has_manifest(folder) and not problems(folder, hashes=False):
        _move_in(folder, target, home)
    is_in = not folder.is_dir() and not killed_early and has_manifest(target)
    if not is_in:
        _move_back(home, target)
    # A save that was blocked for long (a living child held its lock) is no longer the latest.
    elif _is_newer(target, pointer_path(run_folder, LATEST)):
        with suppress(SaveError):
            point(run_folder, LATEST, step)
    take_away(home)
    return f"A save that was killed was {'complete: it is ' + name + ' now' if is_in else 'unfinished: removed'}."


def _move_in(folder: Path, target: Path, home: Path) -> None:
    """Rename the complete checkpoint to its place; what has its name waits in the hidden folder."""
    while True:
        try:
            folder.rename(target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):  # another process was faster
            target.rename(home / f"{_REPLACED}{secrets.token_hex(4)}")
    flush(target.parent)


def _move_back(home: Path, target: Path) -> None:
    """Put back an older checkpoint whose successor never came."""
    for older in home.glob(f"{_REPLACED}*"):
        if not target.exists():
            older.rename(target)
            flush(target.parent)


def _is_newer(folder: Path, pointer: Path) -> bool:
    """Whether a checkpoint was completed after a pointer was written."""
    written = (folder / MANIFEST).stat().st_mtime_ns
    return not pointer.exists() or pointer.stat().st_mtime_ns < written


def _explained(error: BaseException, save: Unfinished, waiting: Path | None = None) -> SaveError | None:
    """A failure of the disk as an error that says what to do; None for every other one."""
    number = disk_error_number(error)
    if number is None or isinstance(error, SaveError):
        return None
    return save_error(number, str(error), save.target, written=bytes_below(save.home), waiting=waiting)
