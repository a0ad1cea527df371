"""Which rank is to blame for the end of a run, and what is to be said of it."""

from __future__ import annotations

import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from pantheraml.launch.rank_files import (
    HUNG,
    Record,
    failures,
    first_failure,
    read_record,
    recorded_hang,
    would_come_again,
)


@dataclass(frozen=True)
class Outcome:
    """How a run of ranks ended.

    Attributes:
        code: exit code of the rank that failed first, 128 + n where a signal n ended it or the agent, else 0.
        rank: the one that failed first; None if none did.
        said: what became of it, as a clause (as sentences, once all is over); empty if all is well.
        signal: what this process was sent while it waited, or None.
        stopped: what the ranks were asked, and where they saved, as sentences; empty if they were not asked to stop.
        why_not_again: why the ranks are not to be started again, as a clause; None if they may be.
    """

    code: int = 0
    rank: int | None = None
    said: str = ""
    signal: signal.Signals | None = None
    stopped: str = ""
    why_not_again: str | None = None


@dataclass(frozen=True)
class Exit:
    """How the process of a rank ended.

    Attributes:
        pid: its number.
        code: of its exit, negative where a signal ended it.
        ours: whether the agent ended it, because of another one.
    """

    pid: int
    code: int
    ours: bool = False


def blame(exits: dict[int, Exit], earliest: int, left_early: set[int], folder: Path) -> Outcome:
    """Which rank failed first and how; its traceback was printed when it failed.

    Ranks that lose one of them fail, too, often before its process has ended. Who left without a traceback, by an exit
    or a signal that was not the agent's, is the cause; else who printed one first.

    Args:
        exits: of all ranks, by rank.
        earliest: the rank whose end was seen first.
        left_early: ranks that left with code 0, and not by the end of their program.
        folder: what the ranks have left there counts.
    """
    records = {rank: read_record(folder, rank, one.pid) for rank, one in exits.items()}
    worked = any(record.steps for record in records.values())
    again = None if worked else "no step was done, so it would come again"
    hang = recorded_hang(folder)
    if hang is not None:
        return Outcome(HUNG, *hang, why_not_again=again)
    told, first = failures(folder), first_failure(folder)
    silent = [rank for rank, one in exits.items() if rank not in told and one.code and not one.ours]
    rank = [*sorted(left_early), *silent, earliest if first is None else first][0]
    where = f"on {socket.gethostname()}{_when(records.get(rank))}"
    code = exits[rank].code if rank in exits else 1
    if rank in left_early:
        said = f"rank {rank} left with exit code 0 {where}, and not by the end of its program (os._exit?)"
        return Outcome(1, rank, said, why_not_again=again)
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (often the machine ran out of memory)" if name == "SIGKILL" else ""
        return Outcome(
            128 - code, rank, f"rank {rank} was ended by {name}{hint} {where}", why_not_again=again
        )
    if not silent and would_come_again(folder):
        again = "its error would come again"
    also = f"; {len(told - {rank})} others had failed, too" if told - {rank} else ""
    return Outcome(code, rank, f"rank {rank} ended with exit code {code} {where}{also}", why_not_again=again)


def _when(record: Record | None) -> str:
    if record is None or record.step is None:
        return ""
    return f" after step {record.step}" if record.steps else f" in step {record.step + 1}"
