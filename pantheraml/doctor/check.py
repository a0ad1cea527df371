"""A check: a probe, a judge, and what surrounds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pantheraml.doctor.finding import Finding


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: of its rows.
        probe: collects facts in a process of its own, so it is a function of a module; what it returns can be pickled.
        judge: makes rows of the facts, and asks nothing of the machine.
        if_it_fails: what to type when the probe raises, dies or hangs.
        seconds: that the probe may take.
        counts: the probe is called with the number of GPUs that torch sees; else with nothing.
        least_gpus: with fewer the check is left out.
        is_long: a quick examination leaves it out.
    """

    name: str
    probe: Callable[..., Any]
    judge: Callable[[Any], list[Finding]]
    if_it_fails: str
    seconds: float = 60.0
    counts: bool = False
    least_gpus: int = 0
    is_long: bool = False
