"""Trackers (``report_to``) that are down or slow cost a run log lines, late, and never its end.

A call that fails, or takes longer than half a minute, is warned of, and the tracker is left alone for a minute, then
for two, four and so on up to an hour. Log lines wait meanwhile, and are sent first when it is tried again.
All calls are made by the training's own thread, since clients keep their runs per thread: what never comes back is for
the client's own time limit to end.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from pantheraml.errors import first_line
from pantheraml.log import say, warn
from pantheraml.models.patching import PatchSet

# Seconds: the first and the longest time for which a tracker is left alone, and what a call may take.
FIRST_PAUSE, LONGEST_PAUSE, SLOW = 60.0, 3600.0, 30.0
_MOST_LINES = 1000
_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
# Somebody may be asked for a password in the first; the second is the last chance to send what waits.
_BEGIN, _END = "on_train_begin", "on_train_end"


class GuardedTracker:
    """A tracker whose failures end no run.

    Args:
        name: what it is called in warnings.
        clock: seconds, from any moment on.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._pause = self._until = 0.0
        self._waiting: deque[Callable[[], Any]] = deque(maxlen=_MOST_LINES)

    def call(
        self, method: Callable[..., Any], event: str, args: Any, state: Any, control: Any, **details: Any
    ) -> Any:
        """Let the tracker know of an event, if it is time to; what the method returned, or None."""
        act = partial(method, args, state, control, **details)
        if event == "on_log":  # what it is told may be told later
            logs = dict(details.pop("logs", None) or {})
            self._waiting.append(partial(method, args, copy.copy(state), control, logs=logs, **details))
            act = None
        began = self._clock()
        if began < self._until and event != _END:
            return None
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
            found = None if act is None else act()
        except Exception as error:  # clients of trackers have no error in common
            self._leave_alone(f"failed ({type(error).__name__}: {first_line(error)})", event)
            if event == _END and self._waiting and act is not None:  # it may close what it has
                with suppress(Exception):
                    act()
            return None
        took = self._clock() - began
        if took > SLOW and event not in (_BEGIN, _END):
            self._leave_alone(f"took {took:.0f} s", event)
        elif self._pause:
            self._pause = 0.0
            say(f"{self._name} is back; it has every log line that waited.")
        return found

    def _leave_alone(self, what: str, event: str) -> None:
        self._pause = min(2 * self._pause or FIRST_PAUSE, LONGEST_PAUSE)
        self._until = self._clock() + self._pause
        if event == _END:
            warn(
                f"{self._name} {what} at the end of the run; {len(self._waiting)} log lines did not get there."
            )
        else:
            warn(
                f"{self._name} {what}. Training goes on; log lines wait until it is tried again in {self._pause:.0f} s."
            )


class TrackerGuard:
    """Guards the trackers of a trainer; ``patches`` knows which methods were replaced."""

    def __init__(self) -> None:
        self._guarded: list[TrainerCallback] = []
        self.patches = PatchSet()

    def cover(self, handler: CallbackHandler) -> None:
        """Guard those trackers of ``handler`` that are not guarded yet; callbacks of other kinds stay as they are."""
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        for callback in handler.callbacks:
            if not isinstance(callback, kinds) or any(callback is one for one in self._guarded):
                continue
            self._guarded.append(callback)
            tracker = GuardedTracker(type(callback).__name__.removesuffix("Callback"))
            for event in _EVENTS:
                if getattr(type(callback), event) is not getattr(TrainerCallback, event):
                    call = partial(_call, tracker, getattr(callback, event), event)
                    self.patches.bind(callback, event, call, "a tracker that is down stops no training")


def _call(
    tracker: GuardedTracker, method: Callable[..., Any], event: str, owner: object, *args: Any, **details: Any
) -> Any:
    """What a guarded callback's method does; ``owner``, the callback, is bound in ``method`` already."""
    return tracker.call(method, event, *args, **details)
