"""The commands of the README and of CONTRIBUTING do what they say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def steps(target):
    """What ``make target`` would run, where everything is installed."""
    installed = [f"--assume-old={folder}/installed" for folder in (".venv", ".venv-oldest")]
    done = subprocess.run(
        ["make", "-n", *installed, target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.promise("C7")
def test_the_full_and_the_quick_run_are_a_command_each():
    full, quick = steps("test"), steps("quick")
    for part in (
        "ruff check",
        "ruff format --check",
        "lint-imports",
        "pyright",
        "-m pytest",
        "oldest/bin/python -m pytest",
    ):
        assert part in full, part
    folders = [word for word in quick.split() if word.startswith("tests/")]
    assert len(folders) > 5 and all((ROOT / folder).is_dir() for folder in folders)
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")
