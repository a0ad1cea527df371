"""A script in a process that is forked after the imports: it begins at once, where a new Python takes five seconds.

For what depends on nothing that a new Python would find; ranks that the script starts are new ones.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
import warnings
from pathlib import Path


def start(script, *words, out: int | None = None, err: int) -> multiprocessing.Process:
    """Begin ``python script words``, which writes to the file descriptors ``out`` (None: nowhere) and ``err``."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(str(script), words, out, err))
    child.start()
    return child


def run(script, *words, seconds=100) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``python script words``."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = start(script, *words, out=out.fileno(), err=err.fileno())
        child.join(seconds)
        child.kill()
        child.join()
        return child.exitcode, *(_read(file) for file in (out, err))


def _read(file) -> str:
    file.seek(0)
    return file.read().decode()


def _run(script, words, out, err):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from pantheraml import log

    # As it would be in a new process.
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    log._said.clear()
    logging.root.handlers.clear()
    log.logger.handlers.clear()
    warnings.resetwarnings()
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *map(str, words)]
    sys.orig_argv = [sys.executable, *sys.argv]
    os.dup2(os.open(os.devnull, os.O_WRONLY) if out is None else out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
