"""Runs scripts one after another in one process, so that the libraries are imported once.

Reads a JSON list of ``{"script", "arguments", "printed"}`` from standard input. Each script runs as ``__main__`` in the
current folder; what it prints goes to the file ``printed``, with the traceback if it fails.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

from pantheraml import cleanup_multi_gpu, disable_grpo_support, disable_multi_gpu

for run in json.load(sys.stdin):
    sys.argv = [run["script"], *run["arguments"]]
    with Path(run["printed"]).open("wb") as printed:
        # The streams stay the same objects: logging handlers made during an earlier script keep writing to them.
        os.dup2(printed.fileno(), sys.stdout.fileno())
        os.dup2(printed.fileno(), sys.stderr.fileno())
    gc.freeze()  # the libraries: looking through them for garbage takes a third of a short training
    try:
        runpy.run_path(run["script"], run_name="__main__")
    except BaseException:  # one script that fails must not keep the others from running
        traceback.print_exc()
    disable_grpo_support()
    disable_multi_gpu()
    cleanup_multi_gpu()  # the next script is a run of its own
    sys.stdout.flush()
    sys.stderr.flush()
