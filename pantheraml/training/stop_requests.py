"""What asks a run to stop or to save, on any rank: signals, and files in its folder."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from pantheraml.distributed.agreement import Agreement
from pantheraml.log import say, warn
from pantheraml.training.stop_signals import StopSignals

STOP, SAVE = "STOP", "SAVE"
# Seconds between two looks: of the thread, at the run's folder, and while ranks are agreeing.
_LOOK, _LOOK_AT_FILES, _LOOK_FOR_RANKS = 0.1, 1.0, 0.01


class StopRequests:
    """Hears what is asked for while a run trains, and says at which moment all ranks do it.

    A file ``STOP`` or ``SAVE`` in the folder is taken away when it is seen, so that it is obeyed once.

    Args:
        agreement: of the ranks of this run.
        folder: where the files are looked for; None on ranks that do not look.
    """

    def __init__(self, agreement: Agreement, folder: Path | None) -> None:
        self._agreement, self._folder = agreement, folder
        self._signals, self._over = StopSignals(), threading.Event()
        self._stops = False  # whether this rank has been asked to
        self._said: str | None = None
        self._thread = threading.Thread(target=self._watch, name="pantheraml-stop", daemon=True)
        self._signals.listen()
        self._thread.start()

    @property
    def heard(self) -> str | None:
        """The signal that this rank was sent, by its name."""
        return None if self._signals.heard is None else self._signals.heard.name

    def passed(self) -> str | None:
        """A step or a batch of evaluation is done; what all ranks do now: a signal's name, STOP, SAVE, or None."""
        return self._agreement.passed()

    def close(self) -> None:
        """Hear nothing any more; signals do what they did before."""
        self._over.set()
        self._thread.join()
        self._agreement.close()
        self._signals.close()

    def _take_signal(self) -> None:
        if not self._stops and self.heard is not None:
            self._stops = True
            self._agreement.wish(self.heard)

    def _watch(self) -> None:
        wait, files_at = _LOOK, time.monotonic()
        try:
            while not self._over.wait(wait):
                self._take_signal()
                if time.monotonic() >= files_at:
                    files_at = time.monotonic() + _LOOK_AT_FILES
                    self._take_file()
                wait = _LOOK_FOR_RANKS if self._agreement.turn() else _LOOK
                self._say()
        except RuntimeError:  # the store is gone: the run is over
            self._agreement.give_up()

    def _take_file(self) -> None:
        for name in (STOP, SAVE):
            if self._folder is None or self._stops or not (self._folder / name).exists():
                continue
            self._stops = name == STOP
            self._agreement.wish(name)
            try:
                (self._folder / name).unlink()
            except OSError as error:
                warn(
                    f"{self._folder / name} cannot be removed ({error.strerror}); no file is looked for again."
                )
                self._folder = None

    def _say(self) -> None:
        known = self._agreement.known
        if known is not None and known != self._said:
            then = ", and goes on" if known == SAVE else ", and ends"
            again = "; Ctrl-C once more ends it at once" if known == "SIGINT" else ""
            say(f"{known}: the run saves when this step is done{then}{again}.")
        self._said = known
