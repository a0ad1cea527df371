"""What ranks say to one another between the parts of a step, so that one that failed fails all of them at once."""

from __future__ import annotations

import traceback

from pantheraml.distributed.process_group import gather_numbers, gather_objects
from pantheraml.errors import PantheraMLError, first_line


def tell(failure: Exception | None, *numbers: float) -> list[list[float]]:
    """Say ``numbers``, or that this rank has failed; every rank calls this, with as many numbers.

    It is a single small reduction between hosts: nobody waits for a GPU.

    Returns:
        The numbers of each rank, by rank.

    Raises:
        Exception: ``failure``, on the rank that passes it.
        PantheraMLError: on all other ranks, with its traceback as a note.
    """
    found = gather_numbers([float(failure is not None), *numbers])
    failed = [rank for rank, (has_failed, *_) in enumerate(found) if has_failed]
    if not failed:
        return [said for _, *said in found]
    told = gather_objects(None if failure is None else _described(failure))
    if failure is not None:
        raise failure
    line, trace = told[failed[0]] or ("", "")
    error = PantheraMLError(
        got=f"Rank {failed[0]} failed: {line}.",
        need="Ranks take every step together, so this one ends with it.",
    )
    error.add_note(f"On rank {failed[0]}:\n{trace}")
    raise error


def _described(failure: Exception) -> tuple[str, str]:
    return f"{type(failure).__name__}: {first_line(failure)}", "".join(traceback.format_exception(failure))
