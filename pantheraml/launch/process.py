"""The facts about this process that decide whether its program can be started again.

A rank runs the program from its beginning, so that has to be somewhere where other processes can read it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Source = Literal["file", "module", "command", "stdin"]

# Options of the interpreter whose value may be the next word.
_WITH_VALUE = "WX"


@dataclass(frozen=True)
class Process:
    """What is known of a Python process besides its environment variables.

    Attributes:
        source: where its program comes from: a file or folder, ``-m``, ``-c``, or standard input.
        interactive: somebody types, or will after the program (``python -i``).
        ipython: it runs in IPython or a Jupyter kernel.
        pytest: it runs pytest's tests.
        child: it was made by Python's ``multiprocessing``.
    """

    source: Source = "file"
    interactive: bool = False
    ipython: bool = False
    pytest: bool = False
    child: bool = False

    @classmethod
    def read(cls) -> Process:
        """The facts of this process."""
        shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
        # pytest's variables are inherited by processes that its tests start; its modules are not.
        pytest_variables = {"PYTEST_VERSION", "PYTEST_CURRENT_TEST"} & os.environ.keys()
        return cls(
            source=program_source(sys.orig_argv),
            interactive=bool(sys.flags.interactive or sys.flags.inspect or hasattr(sys, "ps1")),
            ipython=shell is not None and shell() is not None,
            pytest=bool(pytest_variables) and "_pytest" in sys.modules,
            child=multiprocessing.parent_process() is not None,
        )

    @property
    def is_notebook(self) -> bool:
        """Whether the program is typed or piped in, bit by bit, so that there is nothing to start again."""
        return self.ipython or self.interactive or self.source == "stdin"

    @property
    def why_not_rerun(self) -> str | None:
        """Why the program must not be started again in other processes, as a clause; None if it may be."""
        if self.child:
            return "this process is a child of Python's multiprocessing, whose parent runs the script"
        if self.pytest:
            return "this process runs pytest, and each copy of it would run all tests"
        if self.ipython:
            return "this process is a notebook or an IPython shell, whose cells other processes cannot repeat"
        if self.source == "stdin" and not self.interactive:
            return "the program came from standard input, which other processes cannot read again"
        if self.interactive:
            return "this Python is interactive, and other processes cannot repeat what is typed"
        return None


def program_source(command: Sequence[str]) -> Source:
    """Where Python takes its program from, by the words it was started with (``sys.orig_argv``)."""
    words = iter(command[1:])
    for word in words:
        if word == "-":
            return "stdin"
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(words, None)
            continue
        if not word.startswith("-"):
            return "file"
        for place, letter in enumerate(word[1:], 2):  # options of one letter may be joined: -uc
            if letter == "c":
                return "command"
            if letter == "m":
                return "module"
            if letter in _WITH_VALUE:
                if place == len(word):
                    next(words, None)
                break
    return "stdin"
