"""What the library tells its user: one logger, each notice once.

Importing configures nothing. The first message attaches a stderr handler to the ``pantheraml``
logger, and only when the program has configured no logging of its own.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

logger = logging.getLogger("pantheraml")

_said: set[str] = set()
_quiet = False


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
