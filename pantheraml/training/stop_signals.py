"""Signals that ask a run to stop: noted when they come, obeyed where a step ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from pantheraml.launch.stopping import SIGNALS


class StopSignals:
    """Notes the first signal that asks this process to stop, while the program goes on.

    A repeated signal changes nothing (schedulers repeat themselves) unless one of the two is Ctrl-C: then somebody
    waits, and the second one does at once what it would do without us. A signal for which somebody set a handler, or
    which is ignored, is left alone. Outside of the main thread, which gets all signals, nothing is heard.

    Attributes:
        heard: the first signal, or None.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Begin; ``close`` puts back what was there."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._hear)

    def close(self) -> None:
        """Put the handlers back, where nobody has set another one since."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._hear:
                signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, _: FrameType | None) -> None:
        is_forked = os.getpid() != self._process  # a program's own workers end as ever
        if not is_forked and self.heard is None:
            self.heard = signal.Signals(number)
        elif is_forked or signal.SIGINT in (self.heard, number):
            self.close()
            signal.raise_signal(number)


def leave_signals_to_rank(loader: DataLoader[Any]) -> None:
    """Let processes that read rows go on until their rank has saved.

    Terminals, torchrun and SLURM send signals to all processes of a run. A rank that ends asks its workers by SIGTERM
    as well, twice if need be, so the second one is obeyed.

    Args:
        loader: whose workers are not started yet; accelerate's, perhaps, around torch's.
    """
    within: DataLoader[Any] = getattr(loader, "base_dataloader", loader)
    within.worker_init_fn = partial(_begin_worker, within.worker_init_fn)


def _begin_worker(begin: Callable[[int], object] | None, number: int) -> None:
    """What a worker does first, and then what it would have begun with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if begin is not None:
        begin(number)
