"""A script in a process that is forked after the imports: it begins at once, where a new Python takes five seconds.

For what depends on nothing that a new Python would find; ranks that the script starts are new ones.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


def start(script, *words, out: int | None = None, err: int) -> int:
    """Begin ``python script words``, which writes to the file descriptors ``out`` (None: nowhere) and ``err``.

    Returns its pid. (A child of multiprocessing starts no ranks.)
    """
    pid = os.fork()
    if pid == 0:
        _run(str(script), words, out, err)
    return pid


def end(pid: int, seconds=100) -> int:
    """The exit code of a process, negative for a signal; it is killed if it goes on for longer."""
    until = time.monotonic() + seconds
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.02)
    if found[0] == 0:
        os.kill(pid, signal.SIGKILL)
        found = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(found[1])


def run(script, *words, seconds=100) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``python script words``."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = end(start(script, *words, out=out.fileno(), err=err.fileno()), seconds)
        return code, *(_read(file) for file in (out, err))


def _read(file) -> str:
    file.seek(0)
    return file.read().decode()


def _run(script, words, out, err):
    code = 1
    try:
        _be_new(script, words)
        os.dup2(os.open(os.devnull, os.O_WRONLY) if out is None else out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _be_new(script, words):
    """Forget what the tests of this process have left behind."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from pantheraml import log

    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    log._said.clear()
    for logger in (logging.root, log.logger):
        logger.handlers.clear()
    warnings.resetwarnings()
    for name in ("PYTEST_VERSION", "PYTEST_CURRENT_TEST"):
        os.environ.pop(name, None)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *map(str, words)]
    sys.orig_argv = [sys.executable, *sys.argv]
