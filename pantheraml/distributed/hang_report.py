"""The report of a run that hangs: which rank is to blame, in one sentence, and then what every rank does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from pantheraml.distributed import flight_record
from pantheraml.distributed.heartbeats import Beat
from pantheraml.distributed.stacks import Frame, Thread, collective_of, is_of_python, parse, place


@dataclass(frozen=True)
class Stacks:
    """What a rank tells, or is found of it, when a run hangs.

    Attributes:
        text: its stacks, as ``faulthandler`` writes them; empty if they cannot be had.
        note: why its process tells nothing, as a clause; mostly empty.
        flight: its last collectives, of ``flight_record``.
    """

    text: str = ""
    note: str = ""
    flight: str = ""

    def written(self) -> str:
        """As text that the store can keep."""
        return json.dumps(asdict(self))


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
    def threads(self) -> tuple[Thread, ...]:
        """Its threads, the one that trains first."""
        return parse(self.stacks.text, self.beat.place.thread if self.beat.place else 0)

    @property
    def where(self) -> str:
        """Where its training stands, as a line of source or two; empty if that is not known."""
        frames = self._frames
        caller = next((frame for frame in frames if not is_of_python(frame)), None)
        if not frames or caller is None or caller == frames[0]:
            return place(frames[0]) if frames else ""
        return f"{place(frames[0])}, called from {place(caller)}"

    @property
    def waits(self) -> str:
        """In which collective it waits, and the line that called it; empty if it is in none."""
        found = collective_of(self._frames)
        return f"{found[0]} ({found[1][0]}:{found[1][1]})" if found else ""

    @property
    def _frames(self) -> tuple[Frame, ...]:
        return next((thread.frames for thread in self.threads if thread.trains), ())


def blamed(findings: list[Finding]) -> list[Finding]:
    """The ranks that the others wait for; all of them where that cannot be told.

    Who gives no sign of life comes first, then who trains no more, then who is in no collective, then who has asked a
    GPU for fewer of them. Of several, those that said least often that they go on; then those that are where few others
    are.
    """
    for some in (
        [one for one in findings if one.silent is not None],
        [one for one in findings if one.beat.left or one.beat.place is None],
        [one for one in findings if not one.waits],
        _behind(findings),
    ):
        if some and len(some) < len(findings):
            return _behind(some) or some
    fewest = min(one.beat.marks for one in findings)
    behind = [one for one in findings if one.beat.marks == fewest]
    if len(behind) < len(findings) and not all(one.waits for one in findings):
        return behind
    places = Counter(one.waits or one.where for one in findings)
    most = max(places.values())
    return [one for one in findings if places[one.waits or one.where] < most] or findings


def _behind(findings: list[Finding]) -> list[Finding]:
    """Ranks that have not asked for a collective, by the flight recorder, that others have asked for."""
    asked = [flight_record.asked_for(one.stacks.flight) for one in findings]
    shared = set.intersection(*(set(one) for one in asked)) if asked else set[str]()
    most = {group: max(one[group] for one in asked) for group in shared}
    return [
        one
        for one, numbers in zip(findings, asked, strict=True)
        if any(numbers[group] < most[group] for group in shared)
    ]


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
            why = f"its process {one.stacks.note}"
        return f"{who} has given no sign of life for {one.silent:.0f} s at step {beat.step}: {why}"
    does = (
        f"it waits in {one.waits}" if one.waits else f"it is in {one.where or 'a place that it cannot tell'}"
    )
    return f"{who} has not moved for {one.idle:.0f} s at step {beat.step}: {does}"


def _meanwhile(one: Finding) -> str:
    if one.waits:
        return f"wait in {one.waits}"
    asked = flight_record.waits_in(one.stacks.flight)
    if asked and one.where:
        return f"wait in {one.where} for the GPU, which is in {asked}"
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
    for text, ranks in _alike(findings, _stack_lines):
        lines += ["", f"Stacks of {ranks}, the innermost call first:", *text]
    for text, ranks in _alike(findings, lambda one: flight_record.lines(one.stacks.flight)):
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


def _stack_lines(one: Finding) -> Iterable[str]:
    if one.stacks.note:
        yield f"  (its process {one.stacks.note})"
    elif not one.threads:
        yield "  none"
    for thread in one.threads:
        yield from thread.lines()
