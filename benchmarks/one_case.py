"""One case in this process; ``benchmarks.lora_step`` starts one such process for each.

    python -m benchmarks.one_case '{"row": "default", "kind": "step", "who": "hf", "model": "/tmp/llama8b"}'

The last line is ``RESULT`` and a JSON object: the figures with ``status`` "ok", or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from benchmarks.cases import Case
from benchmarks.device import BadGradient, versions


def measure(case: Case) -> dict[str, Any]:
    """The figures of ``case``."""
    if case.kind == "limit":
        from benchmarks.limit import measure as way
    elif case.kind == "decode":
        from benchmarks.decode import measure as way
    elif case.kind == "longest":
        from benchmarks.plain_loop import longest as way
    elif case.kind == "ragged" or case.who == "ours":
        from benchmarks.train_run import measure as way
    else:
        from benchmarks.plain_loop import measure as way
    return way(case)


def run(case: Case) -> dict[str, Any]:
    """``measure``, and a status instead of an exception."""
    try:
        outcome = {"status": "ok", **measure(case)}
    except Exception as error:
        traceback.print_exc()
        status = "bad gradient" if isinstance(error, BadGradient) else "failed"
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(("unsloth", "liger")):
            status = "not installed"
        outcome = {"status": status, "reason": f"{type(error).__name__}: {error}"[:400]}
    return {**outcome, "versions": versions()}


if __name__ == "__main__":
    print("RESULT " + json.dumps(run(Case(**json.loads(sys.argv[1])))), flush=True)
