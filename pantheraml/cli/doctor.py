"""Examine this machine and print what was found."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from pantheraml.doctor.examination import examine
from pantheraml.doctor.finding import is_healthy
from pantheraml.doctor.report import print_table, to_json


def run_doctor(*, quick: bool = False, as_json: bool = False) -> bool:
    """Check this machine; says what it does meanwhile, on a terminal.

    Args:
        quick: leave out what takes long.
        as_json: print JSON and nothing else.

    Returns:
        Whether nothing is wrong.
    """
    from rich.console import Console

    # Some libraries log to standard output as they are loaded.
    with Console(stderr=True).status("Checking", spinner="line") as status, redirect_stdout(sys.stderr):
        findings = examine(quick=quick, begin=lambda name: status.update(f"Checking: {name}"))
    if as_json:
        print(to_json(findings))
    else:
        print_table(findings, Console())
    return is_healthy(findings)
