"""An optimizer's state of which every rank holds a share: each writes and reads its own (torch.distributed.checkpoint).

    optimizer/rest.pt                      what is small and the same on all ranks: steps, groups
    optimizer/part-00000/__RANK_0.distcp   what a rank wrote
    optimizer/part-00000/.metadata         which values of which tensor lie where

Values are called as in the optimizer's own state dict, by the number of the weight, so that any number of ranks reads
them, shared out in another way or whole. torch's writer keeps copies in host memory of all that goes into one file
until it is closed, which is why there are parts.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from pantheraml.checkpoint.folder_files import reason_of
from pantheraml.checkpoint.names import OPTIMIZER
from pantheraml.checkpoint.part_index import PartReader
from pantheraml.distributed.process_group import get_rank
from pantheraml.errors import CheckpointError, first_line
from pantheraml.models.shares import room_for, share_bytes, whole

_REST = "rest.pt"
# Bytes of a rank's share in one file.
_MOST = 2**30


def is_in_parts(checkpoint: Path) -> bool:
    """Whether a checkpoint has an optimizer's state in parts."""
    return (checkpoint / OPTIMIZER / _REST).is_file()


def clear_parts(checkpoint: Path) -> None:
    """Take away the parts of a checkpoint that is about to be written over; rank 0 does this."""
    shutil.rmtree(checkpoint / OPTIMIZER, ignore_errors=True)


def write_parts(state: dict[str, Any], checkpoint: Path, *, is_first: bool) -> None:
    """Write a state dict of an optimizer; every rank calls this, and is to be told of what fails on another one.

    Args:
        state: ``state`` and whatever else is in it; shares are ``DTensor``.
        checkpoint: the folder, which all ranks see.
        is_first: whether this rank writes what all ranks have.

    Raises:
        OSError, RuntimeError: the disk failed on this rank.
    """
    shares = {
        f"{number}.{name}": value
        for number, entry in state["state"].items()
        for name, value in entry.items()
        if _is_share(value)
    }
    rest = {
        number: {name: _small(value) for name, value in entry.items() if not _is_share(value)}
        for number, entry in state["state"].items()
    }
    folder, parts = checkpoint / OPTIMIZER, list(_parts(shares))
    with _own_failure():
        for number, part in enumerate(parts):
            dcp.save(part, storage_writer=dcp.FileSystemWriter(_part_folder(folder, number)))
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "state": rest, "parts": len(parts)}, folder / _REST)


def own_files(checkpoint: Path) -> list[str]:
    """The files that this rank has written of a checkpoint, as paths from there."""
    found = checkpoint.glob(f"{OPTIMIZER}/part-*/__{get_rank()}_*")
    return sorted(path.relative_to(checkpoint).as_posix() for path in found)


def read_parts(checkpoint: Path, parameters: list[Tensor]) -> dict[str, Any]:
    """The state dict that was written; every rank calls this, and gets its shares of what is as large as a weight.

    Args:
        checkpoint: the folder, written by any number of ranks.
        parameters: of the optimizer, in its order, shared out or whole.

    Raises:
        CheckpointError: it cannot be read, or is of other weights.
    """
    folder = checkpoint / OPTIMIZER
    with _unreadable(folder):
        state: dict[str, Any] = torch.load(folder / _REST, map_location="cpu", weights_only=True)
        saved = sum(len(group["params"]) for group in state["param_groups"])
        if saved != len(parameters):
            raise CheckpointError(
                got=f"{folder} has the state of {saved} weights.",
                need=f"This run trains {len(parameters)}.",
                fix="Go on with the model and the settings that it was saved with.",
            )
        for number in range(state.pop("parts")):
            reader = PartReader(_part_folder(folder, number))
            known: dict[str, Any] = reader.read_metadata().state_dict_metadata
            part = {
                key: room_for(
                    known[key].size, known[key].properties.dtype, parameters[int(key.split(".")[0])]
                )
                for key in known
            }
            dcp.load(part, storage_reader=reader)
            for key, value in part.items():
                weight, _, name = key.partition(".")
                state["state"][int(weight)][name] = value
    return state


def _part_folder(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}"


def _is_share(value: Any) -> bool:
    return isinstance(value, DTensor) and not any(placed.is_partial() for placed in value.placements)


def _small(value: Any) -> Any:
    return whole(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _parts(shares: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same on all ranks: whole sizes say what comes together."""
    part: dict[str, Tensor] = {}
    held = 0
    for key, value in shares.items():
        size = share_bytes(value)
        if part and held + size > _MOST:
            yield part
            part, held = {}, 0
        part[key] = value
        held += size
    if part:
        yield part


@contextmanager
def _own_failure() -> Iterator[None]:
    """Raise what failed on this rank; where it was another one, leave."""
    try:
        yield
    except CheckpointException as error:
        ours = error.failures.get(get_rank())
        if ours is not None:
            raise ours[0] from error


@contextmanager
def _unreadable(folder: Path) -> Iterator[None]:
    """Failures as errors that say what to do; nothing of that one process reads by itself."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise _damaged(folder, cause, f" on rank {rank}") from error
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, cause: BaseException, where: str = "") -> CheckpointError:
    said = reason_of(cause) if isinstance(cause, OSError) else first_line(cause)
    name = getattr(cause, "filename", None)
    return CheckpointError(
        got=f"The optimizer's state in {folder} cannot be read{where} ({said}{f': {name}' if name else ''}).",
        need="Every rank reads what any of them has written, on a disk that all of them see.",
        fix=f"Use another checkpoint; `pantheraml verify {folder.parent.parent}` says which are whole.",
    )
