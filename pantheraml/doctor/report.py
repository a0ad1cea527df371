"""Findings for people, as one table, and for programs, as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pantheraml.doctor.finding import Finding, State, is_healthy
from pantheraml.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

_WORDS: dict[State, str] = {
    "ok": "[green]ok[/]",
    "bad": "[bold red]bad[/]",
    "note": "[yellow]note[/]",
    "skipped": "[dim]skipped[/]",
}


def print_table(findings: Sequence[Finding], console: Console) -> None:
    """One row for each finding, what to type below what was seen, and a verdict."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "what was seen, and what to type", expand=False)
    for finding in findings:
        text = escape(finding.seen)
        if finding.fix:
            text += f"\n[bold]{escape(finding.fix)}[/]"
        if finding.state == "skipped":
            text = f"[dim]{text}[/]"
        table.add_row(_WORDS[finding.state], escape(finding.check), text)
    console.print(table)
    console.print(verdict(findings), highlight=False)


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence."""
    counts = Counter(finding.state for finding in findings)
    bad, notes = counts["bad"], counts["note"]
    also = f" {notes} {'thing' if notes == 1 else 'things'} could be better." if notes else ""
    if bad:
        return (
            f"{bad} {'row is' if bad == 1 else 'rows are'} red: do what is printed there, from the top.{also}"
        )
    return f"Nothing is wrong.{also}"


def to_json(findings: Sequence[Finding]) -> str:
    """``{"version", "healthy", "findings": [{"check", "state", "seen", "fix"}, ...]}``."""
    report = {
        "version": __version__,
        "healthy": is_healthy(list(findings)),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=2)
