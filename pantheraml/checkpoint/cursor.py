"""Where a run stands in its data: what any number of ranks needs to go on with the very next row.

The order of rows is a function of seed, epoch and data alone, so it takes two numbers, the epoch and the rows of it
that are done, and the number of rows of a step, which belongs to the run and not to the machine that it goes on with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

NAME = "cursor.json"


@dataclass(frozen=True)
class Cursor:
    """A place in the data of a run.

    Attributes:
        global_batch_size: rows of a step on all ranks.
        epoch: passes over the data that are done.
        rows: rows of the next pass that are done.
    """

    global_batch_size: int
    epoch: int
    rows: int

    def write(self, checkpoint: Path) -> None:
        """Write it into the folder of a checkpoint."""
        (checkpoint / NAME).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_cursor(checkpoint: Path) -> Cursor | None:
    """The cursor of a checkpoint; None where it has none, or none that can be read."""
    try:
        found = json.loads((checkpoint / NAME).read_text(encoding="utf-8"))
        values = {entry.name: found[entry.name] for entry in fields(Cursor)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values.values())
    return Cursor(**values) if whole and values["global_batch_size"] >= 1 else None
