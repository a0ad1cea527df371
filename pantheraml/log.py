"""What the library tells its user: one logger, each notice once.

Importing configures nothing. The first message attaches a stderr handler to the ``pantheraml``
logger, and only when the program has configured no logging of its own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

logger = logging.getLogger("pantheraml")

_said: set[str] = set()
# Of ranks the first one speaks, also before they join a run: torchrun, accelerate and our agent say who is which.
_quiet = os.environ.get("RANK", "0") != "0"


def set_quiet(quiet: bool) -> None:
    """Say nothing in this process: ranks beside the main one would say the same again."""
    global _quiet  # noqa: PLW0603
    _quiet = quiet


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the stderr of the moment, so that redirections made later are honoured."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("PantheraML: %(message)s"))

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr

    def format(self, record: logging.LogRecord) -> str:
        """The message, drawn where it can be and somebody looks at it."""
        draw = getattr(record, "draw", None)
        return _drawn(draw(), self.stream) if draw and self.stream.isatty() else super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Write above the progress bars, if there are any: they take a line of the terminal each, without its end."""
        bars = sys.modules.get("tqdm.std")
        if bars is None:
            super().emit(record)
            return
        try:
            bars.tqdm.write(self.format(record), file=self.stream)
        except Exception:  # a message that cannot be written ends no run; logging says why
            self.handleError(record)


def _drawn(drawing: Any, stream: TextIO) -> str:
    """What rich makes of ``drawing`` for this terminal, without the last line's end."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    with console.capture() as written:
        console.print(drawing)
    return written.get().rstrip("\n")


def _ensure_handler() -> None:
    if logger.hasHandlers():
        return
    logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)


def say(message: str) -> None:
    """Tell the user something they should know now (level INFO)."""
    if _quiet:
        return
    _ensure_handler()
    logger.info(message)


def show(message: str, draw: Callable[[], Any]) -> None:
    """Tell the user something (level INFO) that has a form of its own on a terminal.

    Args:
        message: what logs and files get.
        draw: makes something that rich can print; called where it will be seen only.
    """
    if _quiet:
        return
    _ensure_handler()
    logger.info(message, extra={"draw": draw})


def warn(message: str) -> None:
    """Tell the user something that may be wrong (level WARNING)."""
    if _quiet:
        return
    _ensure_handler()
    logger.warning(message)


def say_once(message: str) -> None:
    """Tell the user something once per process, however often it comes up."""
    if message not in _said:
        _said.add(message)
        say(message)
