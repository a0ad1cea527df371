"""What torch's flight recorder knows of a rank's collectives: which were asked for, and which are over.

With NCCL a host asks for collectives and goes on; it waits where it asks a GPU for a number, and no line of Python says
for which collective that is. The recorder does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

# Collectives of a rank that are told.
_LAST = 4


def flight_record() -> str:
    """The last collectives of this process as JSON; empty without a recorder."""
    from torch._C import _distributed_c10d as c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        try:
            text = dump()
        except RuntimeError:
            continue
        entries = _entries(text.decode(errors="replace") if isinstance(text, bytes) else str(text))
        if entries:
            waiting = [entry for entry in entries[:-_LAST] if not _is_over(entry)][:1]
            told = [
                {key: value for key, value in entry.items() if key != "frames"}
                for entry in [*waiting, *entries[-_LAST:]]
            ]
            return json.dumps({"entries": told})
    return ""


def asked_for(record: str) -> dict[str, int]:
    """The number of the last collective that a rank has asked for, by process group."""
    found: dict[str, int] = {}
    for entry in _entries(record):
        group, number = "/".join(map(str, entry.get("process_group", ()))), entry.get("collective_seq_id")
        if isinstance(number, int):
            found[group] = max(number, found.get(group, 0))
    return found


def lines(record: str) -> Iterable[str]:
    """The last collectives of a rank, a line each."""
    for entry in _entries(record):
        group = "/".join(map(str, entry.get("process_group", ())))
        yield (
            f"  {entry.get('profiling_name')} number {entry.get('collective_seq_id')} of group {group}, of sizes "
            f"{entry.get('input_sizes')}: {entry.get('state')}"
        )


def waits_in(record: str) -> str:
    """The first of NCCL's collectives that was asked for and is not over, with its number; empty if there is none.

    Of gloo's the recorder does not know whether they are over.
    """
    for entry in _entries(record):
        if str(entry.get("profiling_name")).startswith("nccl") and not _is_over(entry):
            return f"{entry.get('profiling_name')} number {entry.get('collective_seq_id')}"
    return ""


def _is_over(entry: dict[str, Any]) -> bool:
    return entry.get("state") == "completed" or bool(entry.get("retired"))


def _entries(record: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(record)["entries"] if record else []
    except (ValueError, KeyError, TypeError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
