"""The report of a run that hangs: which rank is to blame, in one sentence, and then what every rank does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pantheraml.distributed.heartbeats import Beat
from pantheraml.distributed.stacks import Stacks, collective_of, is_of_python, place

# Collectives of a rank's flight recorder that are told.
_LAST_COLLECTIVES = 4


@dataclass(frozen=True)
class Finding:
    """What is known of one rank.

    Attributes:
        rank: its number.
        beat: what it told last.
        idle: seconds for which its training has not moved.
        silent: seconds since it told anything, where that is too long; None while it does.
        stacks: of its threads.
    """

    rank: int
    beat: Beat
    idle: float
    silent: float | None
    stacks: Stacks

    @property
    def where(self) -> str:
        """Where its training stands, as a line of source or two; empty if that is not known."""
        frames = self.stacks.frames
        caller = next((frame for frame in frames if not is_of_python(frame)), None)
        if not frames or caller is None or caller == frames[0]:
            return place(frames[0]) if frames else ""
        return f"{place(frames[0])}, called from {place(caller)}"

    @property
    def waits(self) -> str:
        """In which collective it waits, and the line that called it; empty if it is in none."""
        found = collective_of(self.stacks.frames)
        return f"{found[0]} ({found[1][0]}:{found[1][1]})" if found else ""


def blamed(findings: list[Finding]) -> list[Finding]:
    """The ranks that the others wait for; all of them where that cannot be told.

    Who gives no sign of life comes first, then who trains no more, then who is in no collective. Of several, those
    that said least often that they go on; then those that are where few others are.
    """
    for some in (
        [one for one in findings if one.silent is not None],
        [one for one in findings if one.beat.left or one.beat.place is None],
        [one for one in findings if not one.waits],
    ):
        if some and len(some) < len(findings):
            return some
    fewest = min(one.beat.marks for one in findings)
    behind = [one for one in findings if one.beat.marks == fewest]
    if len(behind) < len(findings) and not all(one.waits for one in findings):
        return behind
    places = Counter(one.waits or one.where for one in findings)
    most = max(places.values())
    return [one for one in findings if places[one.waits or one.where] < most] or findings


def sentence(findings: list[Finding]) -> str:
    """Who does not move and where, and what the others do meanwhile; without a full stop."""
    culprits = blamed(findings)
    numbers = {one.rank for one in culprits}
    said = [*(_of_culprit(one, len(findings)) for one in culprits)]
    others: dict[str, list[int]] = {}
    for one in findings:
        if one.rank not in numbers:
            others.setdefault(_meanwhile(one), []).append(one.rank)
    for what, ranks in others.items():
        verb, rest = what.split(" ", 1)
        said.append(f"{_ranks(ranks)} {verb + 's' if len(ranks) == 1 else verb} {rest}")
    return "; ".join(said)


def _of_culprit(one: Finding, ranks: int) -> str:
    beat = one.beat
    if beat.place is None:
        return f"rank {one.rank} of {ranks} has not begun to train"
    who = "this process" if ranks == 1 else f"rank {one.rank} of {ranks}"
    who = f"{who} ({beat.place.host}, pid {beat.place.pid})"
    if beat.left:
        return f"{who} {beat.left} at step {beat.step}"
    if one.silent is not None:
        why = f"a call holds its Python lock, in {one.where}" if one.where else "why is not known"
        if one.stacks.note:
            why = f"its process {one.stacks.note}" + (f"; woken, it was in {one.where}" if one.where else "")
        return f"{who} has given no sign of life for {one.silent:.0f} s at step {beat.step}: {why}"
    does = (
        f"it waits in {one.waits}" if one.waits else f"it is in {one.where or 'a place that it cannot tell'}"
    )
    return f"{who} has not moved for {one.idle:.0f} s at step {beat.step}: {does}"


def _meanwhile(one: Finding) -> str:
    if one.waits:
        return f"wait in {one.waits}"
    return f"stay in {one.where}" if one.where else "remain in a place that is not known"


def report(findings: list[Finding], limit: float) -> str:
    """The whole report, of several lines.

    Args:
        findings: of all ranks, by rank.
        limit: seconds that were allowed without progress.
    """
    lines = [
        f"{sentence(findings)}.",
        "",
        f"No progress for {limit:.0f} s is taken for a hang. All ranks:",
        "",
    ]
    rows = [("rank", "host", "pid", "step", "phase", "has not moved for"), *map(_row, findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for text, ranks in _alike(findings, lambda one: _stack_lines(one.stacks)):
        lines += ["", f"Stacks of {ranks}, the innermost call first:", *text]
    for text, ranks in _alike(findings, lambda one: _collectives(one.stacks.flight)):
        if text:
            lines += ["", f"The last collectives of {ranks}, by torch's flight recorder:", *text]
    return "\n".join(lines) + "\n"


def _alike(
    findings: list[Finding], told: Callable[[Finding], Iterable[str]]
) -> Iterable[tuple[tuple[str, ...], str]]:
    """What is told of ranks, with those of whom it is told."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for one in findings:
        groups.setdefault(tuple(told(one)), []).append(one.rank)
    return ((text, _ranks(ranks)) for text, ranks in groups.items())


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _row(one: Finding) -> tuple[str, ...]:
    beat = one.beat
    host, pid = (beat.place.host, str(beat.place.pid)) if beat.place else ("?", "?")
    idle = f"{one.idle:.1f} s" + (f", silent for {one.silent:.1f} s" if one.silent is not None else "")
    return str(one.rank), host, pid, str(beat.step), beat.left or beat.phase, idle


def _stack_lines(stacks: Stacks) -> Iterable[str]:
    if stacks.note:
        yield f"  (its process {stacks.note})" if stacks.threads else f"  none: its process {stacks.note}"
    elif not stacks.threads:
        yield "  none"
    for thread in stacks.threads:
        yield from thread.lines()


def _collectives(flight: str) -> Iterable[str]:
    """The last entries of what the flight recorder wrote, a line each."""
    try:
        entries = json.loads(flight)["entries"] if flight else []
    except (ValueError, KeyError, TypeError):
        yield f"  {flight[:2000]}"
        return
    for entry in entries[-_LAST_COLLECTIVES:]:
        group = "/".join(map(str, entry.get("process_group", ())))
        yield (
            f"  {entry.get('profiling_name')} number {entry.get('collective_seq_id')} of group {group}, of sizes "
            f"{entry.get('input_sizes')}: {entry.get('state')}{', over' if entry.get('retired') else ''}"
        )
