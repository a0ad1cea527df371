"""What a check found: one row of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "bad", "note", "skipped"]
NO_GPU = "no GPU"


@dataclass(frozen=True)
class Finding:
    """One row.

    Attributes:
        check: what was checked.
        state: ``"bad"``: training fails or goes wrong here; ``"note"``: it works, and not as well as it could.
        seen: what was found, as a clause.
        fix: what to type or do, as a sentence; empty where nothing is to be done.
    """

    check: str
    state: State
    seen: str
    fix: str = ""


def is_healthy(findings: list[Finding]) -> bool:
    """Whether nothing is red."""
    return all(finding.state != "bad" for finding in findings)
