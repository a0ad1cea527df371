"""All checks, one after another: whatever becomes of one of them, the others follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pantheraml.doctor.apart import call_apart
from pantheraml.doctor.check import Check
from pantheraml.doctor.checks import (
    all_reduce,
    attention,
    builds,
    disk,
    four_bit,
    gpus,
    host_link,
    parity,
    peer_copies,
    port,
    shared_memory,
    triton_kernel,
    versions,
)
from pantheraml.doctor.finding import NO_GPU, Finding
from pantheraml.errors import first_line

# In the order in which the causes of later ones come first; the one that counts GPUs comes before all.
CHECKS: tuple[Check, ...] = (
    builds.CHECK,
    versions.CHECK,
    shared_memory.CHECK,
    disk.CHECK,
    port.CHECK,
    host_link.CHECK,
    peer_copies.CHECK,
    all_reduce.CHECK,
    triton_kernel.CHECK,
    four_bit.CHECK,
    attention.CHECK,
    parity.CHECK,
)


def examine(
    checks: Sequence[Check] | None = None,
    *,
    quick: bool = False,
    begin: Callable[[str], object] = lambda name: None,
    count: Check = gpus.CHECK,
) -> list[Finding]:
    """Check this machine.

    Args:
        checks: what is checked; None: everything.
        quick: leave out what takes long.
        begin: is told the name of each check as it begins.
        count: the check that goes first, and counts the GPUs for the others.

    Returns:
        The rows, in the order of the checks.
    """
    begin(count.name)
    facts, findings = _run(count, 0)
    number = 0 if facts is None else len(facts.names)
    for check in CHECKS if checks is None else checks:
        if quick and check.is_long:
            findings.append(Finding(check.name, "skipped", "left out by --quick"))
        elif number < check.least_gpus:
            findings.append(Finding(check.name, "skipped", "one GPU" if number else NO_GPU))
        else:
            begin(check.name)
            findings += _run(check, number)[1]
    return findings


def _run(check: Check, gpus: int) -> tuple[Any, list[Finding]]:
    """The facts of a check, None where its probe failed, and its rows."""
    arguments = (gpus,) if check.counts else ()
    try:
        facts = call_apart(check.probe, *arguments, seconds=check.seconds)
        return facts, check.judge(facts)
    except Exception as error:  # a check that breaks is a red row, and not the end of the examination
        seen = f"the check failed: {first_line(error)}"
        return None, [Finding(check.name, "bad", seen, check.if_it_fails)]
