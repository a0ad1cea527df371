"""Calls to the Hugging Face hub that are worth another try: it is busy, or cannot be reached for a moment.

huggingface_hub tries again by itself where it fetches and stores the contents of files. This is around whole downloads
and uploads, whose other requests it makes once; both may be repeated, since files that are there are not sent again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pantheraml.log import say

T = TypeVar("T")
# Seconds: the first pause, which doubles; for how long a call is tried; and for how long where the hub says when.
FIRST, LIMIT, ASKED_LIMIT = 1.0, 60.0, 300.0
_BUSY = {408, 429, 500, 502, 503, 504}


def patiently(call: Callable[[], T], what: str) -> T:
    """What ``call`` returns, tried again with growing pauses while the hub is busy or cannot be reached.

    Args:
        call: may be called several times.
        what: is done, for the log.

    Raises:
        Exception: what ``call`` raised last, or at once where another try cannot help (401, 403, 404).
    """
    began, pause = time.monotonic(), FIRST
    while True:
        try:
            return call()
        except Exception as error:
            reason, asked = passing_reason(error)
            # Ranks that were refused together do not come back together; drawn without touching a run's numbers.
            wait = pause * random.SystemRandom().uniform(1, 1.25) if asked is None else asked
            most = LIMIT if asked is None else ASKED_LIMIT
            if reason is None or time.monotonic() + wait - began > most:
                raise
        say(f"{what}: {reason}; trying again in {wait:.0f} s.")
        time.sleep(wait)
        pause *= 2


def passing_reason(error: BaseException) -> tuple[str | None, float | None]:
    """Why another try may help, or None; and the seconds after which the hub asks for it, if it does."""
    from huggingface_hub import errors as hub

    for one in _causes(error):
        if isinstance(one, hub.OfflineModeIsEnabled):
            return None, None
        response: Any = getattr(one, "response", None)
        if response is not None:
            if response.status_code not in _BUSY:
                return None, None
            return f"the hub answers with status {response.status_code}", _seconds(response.headers)
        # httpx has a name of its own in newer versions of the hub's library.
        names = {base.__name__ for base in type(one).__mro__}
        if names & {"TransportError", "ConnectionError", "TimeoutError"}:
            return f"the hub cannot be reached ({type(one).__name__})", None
    return None, None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _seconds(headers: Any) -> float | None:
    """What ``Retry-After`` says in seconds; its other form, a date, is not taken."""
    said = str(headers.get("Retry-After", ""))
    return float(said) if said.isdecimal() else None
