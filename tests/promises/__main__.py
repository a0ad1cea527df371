"""Runs the tests that show promises, those that need GPUs where there are some, and writes ``docs/promises.md``.

python -m tests.promises                    # all of them
python -m tests.promises tests/hooks -n 2   # words for pytest: what did not run keeps its last result
python -m tests.promises --page             # the page alone, from the results there are
"""

from __future__ import annotations

import sys

import pytest
import torch

from tests.promises.page import PAGE, build
from tests.promises.record import Recorder


def main(arguments: list[str]) -> int:
    """The exit code of the tests."""
    code = 0 if arguments == ["--page"] else run(arguments)
    PAGE.write_text(build(), encoding="utf-8")
    print(f"{PAGE} is written")
    return code


def run(arguments: list[str]) -> int:
    """Runs the marked tests and keeps what became of them."""
    recorder = Recorder()
    chosen = "promise and gpu" if torch.cuda.is_available() else "promise and not gpu"
    code = pytest.main(["-q", "-m", chosen, *(arguments or ["tests"])], plugins=[recorder])
    recorder.write()
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
