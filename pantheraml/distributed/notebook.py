"""Ranks for a typed program: they run a function that is sent to them, since there is no script to start again.

Every rank is a new Python process, so it does not matter whether the notebook has used a GPU. The function travels by
value with what it uses of the notebook (dill, by which datasets recognises functions, writes it down); rank 0's result
and the errors come back as files.
"""

from __future__ import annotations

import io
import linecache
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import dill
import torch

from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.distributed.process_group import setup_multi_gpu
from pantheraml.errors import ConfigError, RunStopped, first_line
from pantheraml.launch.agent import run_ranks
from pantheraml.launch.blame import Outcome
from pantheraml.launch.environment import AGENT, LaunchEnvironment
from pantheraml.launch.rank_files import record_failure
from pantheraml.launch.start import ranks_of_a_function

T = TypeVar("T")

_RANK = "from pantheraml.distributed.notebook import run_as_rank; run_as_rank()"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # which torch elastic takes


def notebook_launch(
    function: Callable[..., T],
    *arguments: Any,
    num_processes: int | None = None,
    config: MultiGPUConfig | None = None,
) -> T:
    """Run ``function(*arguments)`` on every GPU from a notebook, a prompt, or a program from standard input.

    One rank is started for each GPU, as a new process, and gets a copy of the function and of what it uses of the
    notebook: load models and data inside of it. The ranks talk to one another when it begins. Ctrl-C ends all of them.

    Args:
        function: what each rank runs; it may be typed in the notebook.
        arguments: what it is called with.
        num_processes: ranks; None is one for each visible GPU. Without GPUs they run on the CPU.
        config: settings of the run; None takes the defaults.

    Returns:
        What ``function`` returned on rank 0; its tensors are on the CPU.

    Raises:
        ConfigError: called by a rank, or with what cannot be sent to another process.
        Exception: what ``function`` raised on the rank that failed first; its cause is the traceback there.
        RuntimeError: a rank ended without saying why.
    """
    config = _settings(config, num_processes)
    ranks = ranks_of_a_function(config)
    call = _written(function, arguments, replace(config, num_processes=ranks.here))
    with tempfile.TemporaryDirectory(prefix="pantheraml-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(call)
        path = os.pathsep.join(sys.path)  # modules are found where the notebook finds them
        with _own_signals():
            outcome = run_ranks(
                [sys.executable, "-c", _RANK], replace(ranks, variables=(("PYTHONPATH", path),)), folder
            )
        if outcome.code == 0:
            return torch.load(folder / "result", map_location="cpu", weights_only=False)
        error = _error_of(outcome, folder)
    if outcome.signal is not None:
        signal.raise_signal(outcome.signal)  # as if it had been sent to this process alone
    if outcome.stopped:
        raise RunStopped(outcome.code, outcome.stopped)
    raise error


def run_as_rank() -> None:
    """What a rank does: read the call, make it, and leave the result or the error."""
    folder, environment = Path(os.environ[AGENT]), LaunchEnvironment.detect()
    function, arguments, config, sources = dill.loads((folder / "call").read_bytes())
    linecache.cache.update(sources)
    # What was typed is found under the name that it had, so that results and errors are of the notebook's own classes.
    names = getattr(function, "__globals__", {})
    vars(sys.modules["__main__"]).update({k: v for k, v in names.items() if not k.startswith("__")})
    try:
        setup_multi_gpu(config)
        result = function(*arguments)
        if environment.rank == 0:
            _keep_result(result, folder / "result")
    except Exception as error:
        record_failure(environment, folder, error)
        (folder / f"rank_{environment.rank}.error").write_bytes(_pickled(error))
        sys.exit(1)


def _settings(config: MultiGPUConfig | None, num_processes: int | None) -> MultiGPUConfig:
    config = config_of(config)
    if num_processes is None:
        return config
    if config.num_processes not in (None, num_processes):
        raise ConfigError(
            got=f"notebook_launch got num_processes={num_processes} and a config with {config.num_processes}.",
            need="One of them says how many ranks there are.",
            fix="Leave one of them out.",
        )
    return replace(config, num_processes=num_processes)


def _written(function: Callable[..., Any], arguments: tuple[Any, ...], config: MultiGPUConfig) -> bytes:
    """The call as bytes, with the lines of all cells that were typed, which tracebacks show."""
    sources = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    try:
        return dill.dumps((function, arguments, config, sources), recurse=True)
    except Exception as error:
        used = {**dill.detect.globalvars(function), **{f"argument {i}": a for i, a in enumerate(arguments)}}
        culprits = [name for name, value in used.items() if not dill.pickles(value, recurse=True)]
        raise ConfigError(
            got=f"The function cannot be sent to other processes: {first_line(error)}.",
            need="Each rank gets a copy of it, of its arguments, and of what it uses of the notebook"
            + (f"; {' and '.join(culprits)} cannot be copied." if culprits else "."),
            fix="Make such things (models, files, locks) inside of the function.",
        ) from error


def _keep_result(result: object, file: Path) -> None:
    box = io.BytesIO()
    try:
        torch.save(result, box)
    except Exception as error:
        raise ConfigError(
            got=f"What rank 0 returned cannot be sent back: {first_line(error)}.",
            need="The result of notebook_launch comes from another process, by pickle.",
            fix="Return numbers, texts, tensors or a folder's name, and save models inside of the function.",
        ) from error
    file.write_bytes(box.getvalue())


def _pickled(error: Exception) -> bytes:
    """An error that other processes can read; one that cannot be copied is told by its name and text."""
    try:
        text = pickle.dumps(error)
        pickle.loads(text)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return text


class _RankTraceback(Exception):
    """The traceback of another process, as text: the cause of the error that came from there."""


def _error_of(outcome: Outcome, folder: Path) -> Exception:
    kept = folder / f"rank_{outcome.rank}.error"
    if not kept.exists():
        return RuntimeError(outcome.said)
    error: Exception = pickle.loads(kept.read_bytes())
    error.__cause__ = _RankTraceback(f"on rank {outcome.rank}\n\n{kept.with_suffix('.txt').read_text()}")
    return error


@contextmanager
def _own_signals() -> Iterator[None]:
    """What the program does about signals is as before after the block."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
