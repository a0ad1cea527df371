"""How a run that hangs ends: every rank tells its stacks, one writes the report, and all processes are gone.

Whoever saw it first raised an alarm in the store, with the ranks that live. Each of them tells its stacks there, and
those of silent ranks whose files it can read; the lowest one reports.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from pantheraml.distributed.flight_record import flight_record
from pantheraml.distributed.hang_report import Finding, Stacks, blamed, report, sentence
from pantheraml.distributed.heartbeats import Beat, Heartbeats, wait_for
from pantheraml.distributed.stacks import StacksFile, read_stacks, why_silent
from pantheraml.launch.environment import AGENT
from pantheraml.launch.rank_files import HUNG, record_hang

# Seconds for a living rank to tell its stacks, for the report, and for what may be stuck itself.
_STACKS, _REPORT, _WRITE = 6.0, 20.0, 2.0


class HangEnd:
    """The end of a run, as one rank takes part in it.

    Args:
        folder: where the report is written.
        rank: this one.
        stacks: of this process.
        limit: seconds without progress that are taken for a hang.
    """

    def __init__(self, folder: Path, rank: int, stacks: StacksFile, limit: float) -> None:
        self._folder, self._rank, self._stacks, self._limit = folder, rank, stacks, limit
        self.begun = False  # whether this process is about to end

    def alone(self, beat: Beat, *, is_rank: bool) -> None:
        """Report a run of one process; it ends where somebody started it as a rank, and else goes on."""
        culprit, said = self._publish([Finding(0, beat, beat.idle, None, self._own())])
        if is_rank:
            self._leave(culprit, said)

    def together(self, talk: Heartbeats) -> NoReturn:
        """Take part in the report, and end this process."""
        self.begun, rank = True, self._rank
        culprit, said = rank, "the run hung, and no report came"
        with suppress(RuntimeError):  # the store went with a rank that has ended already
            living = talk.get("alarm")
            talk.put(f"stacks/{rank}", self._own().written())
            for other, (beat, _) in enumerate(talk.table):
                if other not in living and beat.place is not None and Path(beat.place.stacks).exists():
                    silent = Stacks(read_stacks(beat.place.stacks), why_silent(beat.place.pid))
                    talk.put(f"stacks/{other}", silent.written())
            if rank == min(living):
                findings = [self._finding(talk, one, living) for one in range(len(talk.table))]
                talk.put("reported", json.dumps(self._publish(findings)))
            if wait_for(lambda: talk.has("reported"), _REPORT):
                culprit, said = talk.get("reported")
        self._leave(culprit, said)

    def _own(self) -> Stacks:
        flight: list[str] = []
        _bounded(lambda: flight.append(flight_record()))
        return Stacks(self._stacks.now(), flight="".join(flight))

    def _finding(self, talk: Heartbeats, rank: int, living: list[int]) -> Finding:
        beat, key = talk.table[rank][0], f"stacks/{rank}"
        if beat.place is None or beat.left:
            note = "is in no training that is watched"
            return Finding(rank, beat, talk.idle(rank), None, Stacks(note=note))
        if wait_for(lambda: talk.has(key), _STACKS):
            found = Stacks(**talk.get(key))
        else:
            found = Stacks(note="did not tell its stacks")
        return Finding(rank, beat, talk.idle(rank), None if rank in living else talk.silent_for(rank), found)

    def _publish(self, findings: list[Finding]) -> tuple[int, str]:
        """Write and print the report; who is to blame, and what is to be said of it at the end."""
        culprit = blamed(findings)[0]
        file = self._folder / f"hang-report-step{max(0, culprit.beat.step)}.txt"
        text = report(findings, self._limit)
        written: list[str] = []

        def write() -> None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                written.append(f"the report is in {file}")
            except OSError as error:
                written.append(f"the report could not be written to {file}: {error}")

        _bounded(write)
        where = written[0] if written else f"writing the report to {file} hangs, too"
        _bounded(lambda: print(f"PantheraML: the run hangs. {text}({where})", file=sys.stderr, flush=True))  # noqa: T201
        return culprit.rank, f"{sentence(findings)}; {where}"

    def _leave(self, culprit: int, said: str) -> NoReturn:
        """End this process, with what it has started, without waiting for anything that may be stuck."""
        if AGENT in os.environ:
            with suppress(OSError):
                record_hang(Path(os.environ[AGENT]), culprit, said)
        with suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        Path(self._stacks.name).unlink(missing_ok=True)
        _bounded(lambda: (sys.stdout.flush(), sys.stderr.flush()))
        os._exit(HUNG)


def _bounded(function: Callable[[], object]) -> None:
    """Call it, and go on after two seconds: a lock, a pipe or a disk may be what the run hangs in."""
    thread = threading.Thread(target=function, name="pantheraml-hang", daemon=True)
    thread.start()
    thread.join(_WRITE)
