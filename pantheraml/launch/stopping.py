"""A request to stop on its way through the process that started the ranks: the ranks get it first, to save.

torch elastic's agent ends its ranks when it gets a signal, and kills them after half a minute; a large checkpoint takes
longer. So the first signal is only passed on: ranks that train save and end, all others end at once, and the agent ends
with them. The second signal, or ten minutes without an end, is torch elastic's.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pantheraml.launch.environment import AGENT

# What asks a program to stop: people (Ctrl-C), and schedulers.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What torch elastic does about others stays its own.
OTHERS = "SIGHUP,SIGQUIT"
# Seconds that ranks have to save.
_LONGEST_SAVE = 600.0
_NOTE = "stopped"


class PassedOn:
    """Within the block, the first of ``SIGNALS`` goes to the ranks, and the second raises elastic's SignalException.

    Without ranks the first one does so, too. Outside of the main thread, which gets all signals, nothing is changed.

    Args:
        folder: the agent's, by which its ranks are known.

    Attributes:
        heard: the first signal, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.heard: signal.Signals | None = None
        self._folder = folder
        self._asked, self._over = threading.Event(), threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> PassedOn:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
            threading.Thread(target=self._insist, name="pantheraml-stopping", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._asked.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        ranks = [] if self.heard else _ranks(self._folder)
        if not ranks:
            from torch.distributed.elastic.multiprocessing.api import SignalException

            raise SignalException(f"{signal.Signals(number).name} was sent.", signal.Signals(number))
        self.heard = signal.Signals(number)
        _write(self._folder, f"{self.heard.name} was sent.")
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        self._asked.set()

    def _insist(self) -> None:
        """Ask again, as somebody else would, when ranks do not end."""
        self._asked.wait()
        if not self._over.wait(_LONGEST_SAVE) and self.heard is not None:
            os.kill(os.getpid(), self.heard)


def _ranks(folder: Path) -> list[int]:
    """The process ids of the ranks that an agent has started."""
    import psutil

    found: list[int] = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            if child.environ().get(AGENT) == str(folder):
                found.append(child.pid)
    return found


def note_stop(said: str) -> None:
    """Tell the agent of this rank, if it has one, that its run was asked to stop, and did not fail.

    Args:
        said: what was asked for and where the run is saved, as a sentence.
    """
    if os.environ.get(AGENT):
        _write(Path(os.environ[AGENT]), said)


def read_stop(folder: Path) -> str:
    """What an agent's ranks were asked, so that nobody takes their end for a failure; empty if nothing."""
    note = folder / _NOTE
    return note.read_text(encoding="utf-8") if note.exists() else ""


def _write(folder: Path, said: str) -> None:
    with suppress(OSError):  # a full disk, or the agent and its folder are gone
        (folder / _NOTE).write_text(said, encoding="utf-8")
