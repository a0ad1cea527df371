"""How a run that hangs ends: every rank tells its stacks, one writes the report, and all processes are gone.

Whoever saw it first raised an alarm in the store, with the ranks that live. Each of them tells its stacks there; the
lowest one of each machine asks by a signal those that are silent, and ends them at last. Where the store is silent,
too, one rank of each machine does all of that, by signals alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from pantheraml.distributed.hang_report import Finding, blamed, report, sentence
from pantheraml.distributed.heartbeats import Beat, Heartbeats, Place, wait_for
from pantheraml.distributed.stacks import Stacks, ask, flight_record, own_stacks, state_of
from pantheraml.launch.environment import AGENT
from pantheraml.launch.ranks import HUNG, record_hang

# Seconds for a living rank to tell its stacks, for the report, for a rank to end by itself, and for what may be stuck.
_STACKS, _REPORT, _LEAVE, _WRITE = 6.0, 20.0, 3.0, 2.0


class HangEnd:
    """The end of a run, as one rank takes part in it.

    Args:
        folder: where the report is written.
        place: of this rank.
        silence: seconds after which a rank that tells nothing does not live.
    """

    def __init__(self, folder: Path, place: Place, silence: float) -> None:
        self._folder, self._place, self._silence = folder, place, silence
        self._once = threading.Lock()

    @property
    def begun(self) -> bool:
        """Whether this process is about to end."""
        return self._once.locked()

    def living(self, talk: Heartbeats) -> list[int]:
        """Ranks that tell something, this one included."""
        return [
            rank
            for rank, (beat, _) in enumerate(talk.table)
            if rank == self._place.rank
            or (beat.place is not None and not beat.left and talk.silent_for(rank) <= self._silence)
        ]

    def tell(self, beats: list[Beat], limit: float) -> None:
        """Report a process that is alone, or cannot reach the others; it goes on."""
        beat = beats[0]
        self._publish([Finding(self._place.rank, beat, beat.idle, None, self._own())], limit)

    def with_store(self, talk: Heartbeats, limit: float) -> None:
        """Take part in the report, and end this process; does nothing where another thread does so already.

        Raises:
            RuntimeError: the store is gone.
        """
        if not self._once.acquire(blocking=False):
            return
        try:
            living = talk.get("alarm")
            rank, beside = self._place.rank, self.beside(talk)
            talk.put(f"stacks/{rank}", json.dumps(self._own().written()))
            is_first_here = rank == min([rank, *(place.rank for place in beside if place.rank in living)])
            silent = [place for place in beside if place.rank not in living] if is_first_here else []
            if silent:  # one that is woken may let the others go on: they have to be about to end by then
                wait_for(lambda: all(talk.has(f"stacks/{one}") for one in living), _STACKS)
            for place in silent:
                found = ask(place.pid, Path(place.stacks), place.thread)
                talk.put(f"stacks/{place.rank}", json.dumps(found.written()))
            if rank == min(living):
                findings = [self._finding(talk, one, living) for one in range(len(talk.table))]
                talk.put("reported", json.dumps(self._publish(findings, limit)))
            told = wait_for(lambda: talk.has("reported"), _REPORT)
            culprit, said = talk.get("reported") if told else (rank, "the run hung, and no report came")
            _kill(silent)
        except RuntimeError:  # the store went with a rank that has ended already
            culprit, said = rank, "the run hung, and the store at which the ranks met is gone"
        self._leave(culprit, said)

    def without_store(self, talk: Heartbeats, mine: Beat, limit: float) -> None:
        """The same where the store does not answer: one rank of this machine reports what signals can tell."""
        if not self._once.acquire(blocking=False):
            return
        beside = self.beside(talk)
        claim = _Claim([self._place, *beside])
        if not claim.taken():
            wait_for(claim.is_done, _REPORT)
            self._leave(self._place.rank, "the run hung")
        idle = {rank: (talk.idle(rank), talk.silent_for(rank)) for rank in range(len(talk.table))}
        stacks = {self._place.rank: self._own()}
        # Who is stopped comes last: when it goes on, so may those that wait for it.
        for place in sorted(beside, key=lambda place: bool(state_of(place.pid))):
            stacks[place.rank] = ask(place.pid, Path(place.stacks), place.thread)
        elsewhere = Stacks(note="is on another machine, and the store at which the ranks met does not answer")
        findings = [
            Finding(
                rank,
                mine if rank == self._place.rank else beat,
                mine.idle if rank == self._place.rank else idle[rank][0],
                idle[rank][1] if rank != self._place.rank and stacks.get(rank, elsewhere).note else None,
                stacks.get(rank, elsewhere),
            )
            for rank, (beat, _) in enumerate(talk.table)
        ]
        culprit, said = self._publish(findings, limit)
        _tell_agent(culprit, said)
        _kill(
            [place for place in beside if stacks[place.rank].note]
        )  # who was woken would report the others' end
        claim.done()
        wait_for(lambda: not any(_lives(place) for place in beside), _LEAVE)
        _kill(beside)
        claim.remove()
        self._leave(culprit, said)

    def give_up(self) -> NoReturn:
        """End this process: what the report waits for does not come."""
        self._leave(self._place.rank, "the run hung, and so did its report")

    def beside(self, talk: Heartbeats) -> list[Place]:
        """Other ranks of this machine that train."""
        mine = self._place
        places = [beat.place for beat, _ in talk.table if beat.place is not None and not beat.left]
        return [place for place in places if place.machine == mine.machine and place.rank != mine.rank]

    def misses_one(self, talk: Heartbeats) -> bool:
        """Whether another rank of this machine is stopped or has ended without a word."""
        return any(state_of(place.pid) for place in self.beside(talk))

    def _own(self) -> Stacks:
        threads = own_stacks(self._place.thread)
        flight: list[str] = []
        _bounded(lambda: flight.append(flight_record()))
        return Stacks(threads, flight="".join(flight))

    def _finding(self, talk: Heartbeats, rank: int, living: list[int]) -> Finding:
        beat = talk.table[rank][0]
        key = f"stacks/{rank}"
        silent = None
        if beat.place is None or beat.left:
            return Finding(
                rank, beat, talk.idle(rank), None, Stacks(note="is in no training that is watched")
            )
        if rank not in living:
            silent = talk.silent_for(rank)
        if wait_for(lambda: talk.has(key), _STACKS):
            found = Stacks.read(talk.get(key))
        else:
            found = Stacks(note="did not tell its stacks, and no other rank of its machine could ask it")
        return Finding(rank, beat, talk.idle(rank), silent, found)

    def _publish(self, findings: list[Finding], limit: float) -> tuple[int, str]:
        """Write and print the report; who is to blame, and what is to be said of it at the end."""
        culprit = blamed(findings)[0]
        file = self._folder / f"hang-report-step{max(0, culprit.beat.step)}.txt"
        text = report(findings, limit)
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
        _tell_agent(culprit, said)
        for child in _children(os.getpid()):
            with suppress(psutil.Error):
                child.kill()
        if self._place.stacks:
            Path(self._place.stacks).unlink(missing_ok=True)
        _bounded(lambda: (sys.stdout.flush(), sys.stderr.flush()))
        os._exit(HUNG)


class _Claim:
    """A file that one of the ranks of a machine makes, and removes when it is the last of them.

    Args:
        places: of all of them, this one included.
    """

    def __init__(self, places: list[Place]) -> None:
        first = min(places, key=lambda place: place.rank)
        self._file = Path(tempfile.gettempdir(), f"pantheraml-hang-{first.pid}-{first.born}")

    def taken(self) -> bool:
        """Whether this process is the first; it is, where files cannot be written."""
        try:
            self._file.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def is_done(self) -> bool:
        """Whether whoever was the first has reported."""
        return not self._file.exists() or self._file.stat().st_size > 0

    def done(self) -> None:
        """Let the others end."""
        with suppress(OSError):
            self._file.write_text("reported")

    def remove(self) -> None:
        """Nobody is left who could ask."""
        with suppress(OSError):
            self._file.unlink()


def _tell_agent(culprit: int, said: str) -> None:
    if AGENT in os.environ:
        with suppress(OSError):
            record_hang(Path(os.environ[AGENT]), culprit, said)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _lives(place: Place) -> bool:
    try:
        process = psutil.Process(place.pid)
        return process.create_time() == place.born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _kill(places: list[Place]) -> None:
    """End processes of this machine, with those that they have started."""
    for place in places:
        if not _lives(place):
            continue
        children = _children(place.pid)
        with suppress(OSError):
            os.kill(place.pid, signal.SIGKILL)
        for child in children:
            with suppress(psutil.Error):
                child.kill()
        if place.stacks:
            Path(place.stacks).unlink(missing_ok=True)


def _bounded(function: Callable[[], object]) -> None:
    """Call it, and go on after two seconds: a lock, a pipe or a disk may be what the run hangs in."""
    thread = threading.Thread(target=function, name="pantheraml-watch-write", daemon=True)
    thread.start()
    thread.join(_WRITE)
