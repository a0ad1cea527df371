"""Errors that say what we got, what is needed, and what to type.

Every error of PantheraML is one paragraph of three parts; each class also is the built-in
exception that existing code would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PantheraMLError(Exception):
    """Base of all errors raised on purpose by PantheraML.

    Args:
        got: what was found, as a sentence.
        need: what is needed instead and why, as a sentence.
        fix: what to type or do, as a sentence.
    """

    def __init__(self, got: str, need: str = "", fix: str = "") -> None:
        self.got, self.need, self.fix = got.strip(), need.strip(), fix.strip()
        super().__init__(" ".join(part for part in (self.got, self.need, self.fix) if part))

    def __reduce__(self) -> tuple[type[PantheraMLError], tuple[str, str, str]]:
        return type(self), (self.got, self.need, self.fix)


class ConfigError(PantheraMLError, ValueError):
    """A setting, flag or combination of flags is wrong."""


class ModelLoadError(PantheraMLError, ValueError):
    """A model or tokenizer cannot be loaded."""


class AdapterError(PantheraMLError, ValueError):
    """An adapter cannot be created, loaded or merged."""


class DataError(PantheraMLError, ValueError):
    """A data set cannot be read, recognised or trained on."""


class SaveError(PantheraMLError, RuntimeError):
    """Nothing was saved, or what was there before is kept."""


class CheckpointError(PantheraMLError, ValueError):
    """A checkpoint, or what points to one, is missing, damaged or foreign."""


class NonFiniteError(PantheraMLError, FloatingPointError):
    """A loss or a gradient of a run is infinite or no number."""


class HardwareError(PantheraMLError, RuntimeError):
    """The machine lacks what was asked for."""


class NotYetError(PantheraMLError, NotImplementedError):
    """A promised feature that this version does not have; the message says what to use."""


class RunStopped(SystemExit):
    """A training run was asked to stop, and is saved; where nobody catches it, the program ends with ``code``.

    It is no ``Exception``: what a script does after its training would be done with a model that is half trained.

    Args:
        code: 128 + n for a signal n, 75 for a file STOP.
        said: what was asked for and where the run is saved, as a sentence.
    """

    def __init__(self, code: int, said: str) -> None:
        super().__init__(code)
        self.said = said

    def __str__(self) -> str:
        return self.said


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """Close names as a sentence (``Did you mean 'q_proj'?``), empty when nothing is close.

    Names that are clearly further away than the closest one are left out.
    """
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)
    alike = [difflib.SequenceMatcher(None, name, word).ratio() for name in close]
    near = [name for name, ratio in zip(close, alike, strict=True) if ratio > alike[0] - 0.1]
    return f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """What another library said, as the beginning of a sentence without its full stop."""
    # str() of a KeyError is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return next(
        (line.strip().rstrip(".:") for line in text.splitlines() if line.strip()), type(error).__name__
    )
