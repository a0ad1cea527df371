"""How many checkpoints of a run are kept."""

from __future__ import annotations

from pathlib import Path

from pantheraml.checkpoint.names import checkpoints
from pantheraml.checkpoint.pointers import LATEST, POINTERS, read_pointer
from pantheraml.checkpoint.unfinished import take_away
from pantheraml.errors import CheckpointError
from pantheraml.log import warn


def retain(run_folder: str | Path, limit: int | None) -> list[Path]:
    """Remove the oldest checkpoints above ``limit``, as transformers counts them; rank 0 does this after a save.

    What ``latest`` and ``best`` name stays and counts, so that more than ``limit`` can be left. While a pointer
    cannot be read, nothing is removed.

    Args:
        run_folder: the run's folder.
        limit: ``save_total_limit``; None or 0: all are kept.

    Returns:
        What was removed.
    """
    run_folder = Path(run_folder)
    if limit is None or limit <= 0:
        return []
    try:
        pointers = {which: read_pointer(run_folder, which, must_exist=False) for which in POINTERS}
    except CheckpointError as error:
        warn(f"No older checkpoint is removed. {error}")
        return []
    found = checkpoints(run_folder)
    kept = {pointer.checkpoint for pointer in pointers.values() if pointer}
    if pointers[LATEST] is None and found:
        kept.add(found[-1].name)
    kept &= {path.name for path in found}
    above = len(found) - max(limit, len(kept))
    removed = [path for path in found if path.name not in kept][: max(above, 0)]
    for path in removed:
        take_away(path)
        if path.exists():
            warn(f"{path} is above save_total_limit={limit} and cannot be removed.")
    return [path for path in removed if not path.exists()]
