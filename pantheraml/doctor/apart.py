"""Call a function in a process of its own: whatever it does there, by its deadline the caller goes on."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

from pantheraml.errors import first_line
from pantheraml.launch.environment import AGENT

T = TypeVar("T")

_CHILD = "from pantheraml.doctor.apart import answer; answer()"
# What makes a process take itself for a rank, or for a task of SLURM that is to start some.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", AGENT)
_OF_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "SLURM_", "GROUP_", "ROLE_")


class ProbeFailed(Exception):
    """A function raised in its process, or the process died or hung; the text says so as a clause."""


def call_apart(function: Callable[..., T], *arguments: object, seconds: float) -> T:
    """``function(*arguments)``, called by a new process that is no rank, whoever started this one.

    Args:
        function: of a module; it and its arguments are pickled.
        arguments: what it is called with.
        seconds: after which the process is killed, with all that it started.

    Returns:
        What the function returned, pickled in between.

    Raises:
        ProbeFailed: the function raised, or the process died or hung.
    """
    with tempfile.TemporaryDirectory(prefix="pantheraml-doctor-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, name],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_variables(),
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise ProbeFailed(f"it did not end within {seconds:g} s") from None
            finally:
                _end(process)
        return _result(folder, code)


def answer() -> None:
    """What the process does: make the call, and leave its result or its error."""
    folder = Path(sys.argv[1])
    result: tuple[bool, object]
    try:
        function, arguments = pickle.loads((folder / "call").read_bytes())
        result = True, function(*arguments)
    except Exception as error:
        result = False, f"{type(error).__name__}: {first_line(error)}"
    (folder / "answer").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # libraries that hang when they are taken down are not what is examined


def _variables() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_RANKS and not name.startswith(_OF_LAUNCHERS)
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path)}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid)]
    with suppress(psutil.NoSuchProcess):
        family += family[0].children(recursive=True)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    with suppress(subprocess.TimeoutExpired):  # one that waits for a driver ends when that answers
        process.wait(5)


def _result(folder: Path, code: int) -> T:  # pyright: ignore[reportInvalidTypeVarUse]
    file = folder / "answer"
    if file.exists():
        is_right, found = pickle.loads(file.read_bytes())
        if is_right:
            return found
        raise ProbeFailed(found)
    lines = (folder / "said").read_text(errors="replace").strip().splitlines()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise ProbeFailed(f"its process {how}" + (f", after {lines[-1].strip()!r}" if lines else ""))
