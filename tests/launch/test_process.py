"""Where a program comes from, and why some cannot be started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pantheraml.launch.process import Process, program_source

ROOT = Path(__file__).parents[2]
DETECT = ROOT / "tests/launch/detect.py"


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ("python train.py", "file"),
        ("python train.py -c 3 -m x", "file"),
        ("python -u -B train.py", "file"),
        ("python -X dev train.py -", "file"),
        ("python -Xdev train.py", "file"),
        ("python -W error -m train", "module"),
        ("python -uWerror train.py", "file"),
        ("python -m train --n 3", "module"),
        ("python -um train", "module"),
        ("python -c pass", "command"),
        ("python -uc pass", "command"),
        ("python -", "stdin"),
        ("python - --n 3", "stdin"),
        ("python", "stdin"),
        ("python -i", "stdin"),
        ("python -i train.py", "file"),
        ("python --check-hash-based-pycs always train.py", "file"),
    ],
)
def test_source_is_read_as_python_reads_it(command, source):
    assert program_source(command.split()) == source


@pytest.mark.parametrize(
    ("process", "part", "is_notebook"),
    [
        (Process(), "", False),
        (Process(source="module"), "", False),
        (Process(source="command"), "", False),
        (Process(source="stdin"), "standard input", True),
        (Process(source="stdin", interactive=True), "interactive", True),
        (Process(interactive=True), "interactive", True),
        (Process(source="module", ipython=True), "notebook", True),
        (Process(pytest=True), "pytest", False),
        (Process(child=True), "multiprocessing", False),
        (Process(child=True, pytest=True, source="command"), "multiprocessing", False),
    ],
)
def test_why_not_rerun(process, part, is_notebook):
    assert (process.why_not_rerun is None) == (part == "")
    assert part in (process.why_not_rerun or "")
    assert process.is_notebook is is_notebook


def test_this_process_runs_pytest():
    assert Process.read().pytest
    assert not Process.read().child


def detected(*words: str | Path, typed: str | None = None, **variables: str) -> dict:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        input=typed,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "words", [[DETECT], ["-m", "tests.launch.detect"], ["-uc", "import tests.launch.detect"]]
)
def test_scripts_modules_and_commands_may_be_started_again(words):
    """pytest's variables are inherited here, and mean nothing."""
    found = detected(*words)
    assert (found["kind"], found["why_not_rerun"], found["is_rank"]) == ("python", None, False)
    assert not found["torch"]


@pytest.mark.parametrize(
    ("words", "part"), [([], "standard input"), (["-"], "standard input"), (["-i"], "interactive")]
)
def test_what_is_piped_in_may_not(words, part):
    found = detected(*words, typed="import tests.launch.detect\n")
    assert found["kind"] == "notebook"
    assert part in found["why_not_rerun"]


def test_python_that_stays_open_may_not():
    assert detected("-i", DETECT, typed="")["kind"] == "notebook"
    assert detected(DETECT, typed="", PYTHONINSPECT="1")["kind"] == "notebook"


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_child_of_multiprocessing_may_not(method):
    program = (
        "import multiprocessing, runpy\n"
        "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    child = context.Process(target=runpy.run_module, args=('tests.launch.detect',))\n"
        "    child.start(); child.join()\n"
    )
    found = detected("-c", program)
    assert found["kind"] == "python"
    assert "multiprocessing" in found["why_not_rerun"]
