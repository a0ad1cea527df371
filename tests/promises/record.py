"""A pytest plugin: what became of each test that shows a promise, kept in ``results.json``."""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.promises.marks import marked

RESULTS = Path(__file__).with_name("results.json")


class Recorder:
    """Counts passed, failed and skipped cases by test, in the process that prints (with xdist: the one in charge)."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        cases = self.outcomes.setdefault(report.nodeid.split("[")[0], Counter())
        if report.when == "call" or report.outcome != "passed":
            cases[report.outcome] += 1

    def write(self, path: Path = RESULTS) -> None:
        """Puts what ran now in the place of what was known of it; other tests with a mark stay, those without go."""
        marked_tests = {name for tests in marked().values() for name in tests}
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        where = machine()
        for test, cases in self.outcomes.items():
            # A test that was skipped here says nothing against what another machine found.
            if cases["passed"] or cases["failed"] or test not in known:
                known[test] = {**{kind: cases[kind] for kind in sorted(cases)}, "where": where}
        known = {test: found for test, found in known.items() if test in marked_tests}
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor or GPUs, and the versions that matter."""
    import torch

    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "CPU"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return f"{device}, Python {platform.python_version()}, {libraries}"
