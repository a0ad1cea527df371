"""The short forms in which SLURM writes hosts and the tasks on each of them."""

from __future__ import annotations

import re

from pantheraml.errors import ConfigError


def expand_hosts(text: str) -> list[str]:
    """The hosts of SLURM's short form: ``gpu[08-10,3]`` is gpu08, gpu09, gpu10 and gpu3.

    Raises:
        ConfigError: it cannot be read.
    """
    hosts = [host for part in re.split(r",(?![^\[]*\])", text.strip()) for host in _expand_part(part)]
    if not all(hosts):
        raise _unreadable(text)
    return hosts


def expand_counts(text: str) -> list[int]:
    """Tasks on each node, of SLURM's short form: ``2(x3),1`` is 2, 2, 2, 1.

    Raises:
        ConfigError: it cannot be read.
    """
    counts: list[int] = []
    for part in text.strip().split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise _unreadable(text)
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _expand_part(part: str) -> list[str]:
    opened = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\](.*)", part)
    if opened is None:
        if "[" in part or "]" in part:
            raise _unreadable(part)
        return [part]
    before, ranges, after = opened.groups()
    endings = _expand_part(after)
    return [f"{before}{number}{ending}" for number in _numbers(ranges) for ending in endings]


def _numbers(ranges: str) -> list[str]:
    """``08-10,3`` is 08, 09, 10, 3: a number is as wide as the first of its range."""
    numbers: list[str] = []
    for one in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", one)
        if found is None:
            raise _unreadable(f"[{ranges}]")
        first, last = found[1], found[2] or found[1]
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return numbers


def _unreadable(text: str) -> ConfigError:
    return ConfigError(
        got=f"{text!r} is not a list that SLURM writes.",
        need="The hosts of a step look like node[1-3,7],gpu01; the tasks on each of them like 4(x2),3.",
        fix="Start Python by srun itself, and do not export SLURM_* variables in the batch script.",
    )
