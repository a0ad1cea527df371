"""Importing pantheraml does nothing, and does it fast."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pantheraml

ROOT = Path(__file__).parents[2]
HEAVY = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "numpy",
    "pydantic",
    "typer",
    "rich",
]
MOST_IMPORT_SECONDS = 0.05
MOST_HELP_SECONDS = 0.5

PROBE = f"""
import json, os, sys, time
before = dict(os.environ)
start = time.perf_counter()
import pantheraml
seconds = time.perf_counter() - start
print(json.dumps({{
    "seconds": seconds,
    "heavy": [name for name in {HEAVY!r} if name in sys.modules],
    "environment_kept": before == dict(os.environ),
    "logging": "logging" in sys.modules and bool(sys.modules["logging"].getLogger("pantheraml").handlers),
    "names": dir(pantheraml),
}}))
"""


def python(*words: str, cwd: Path = ROOT) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.promise("F13")
def test_importing_is_free():
    probes = [json.loads(python("-c", PROBE)) for _ in range(5)]
    assert min(probe["seconds"] for probe in probes) < MOST_IMPORT_SECONDS
    assert probes[0]["heavy"] == []
    assert probes[0]["environment_kept"]
    assert not probes[0]["logging"]
    assert set(pantheraml.__all__) <= set(probes[0]["names"])


def test_asking_what_started_a_process_loads_no_library():
    """Before ranks are started, a process may hold nothing that they need."""
    program = (
        "import json, os, sys; before = dict(os.environ)\n"
        "from pantheraml.launch.environment import LaunchEnvironment\n"
        "LaunchEnvironment.detect()\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps([heavy, before == dict(os.environ)]))"
    )
    assert json.loads(python("-c", program)) == [[], True]


STARTS_RANKS = """
import gc, json, os, sys
from pantheraml.launch import start

def become_agent(ranks):
    heavy = [name for name in ("transformers", "trl", "peft", "accelerate") if name in sys.modules]
    os.write(1, json.dumps([ranks.here, heavy, gc.isenabled()]).encode())
    os._exit(0)

start.become_agent = become_agent
from pantheraml.cli.train import run_training
from pantheraml.config.load import load_config
run_training(load_config("run.yaml"))
"""


def test_a_process_that_starts_ranks_loads_none_of_their_libraries(tmp_path):
    """Ranks begin seconds earlier. Rows are read before, for what is wrong with them is told at once."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three"}\n')
    run = (
        f"{{model: {{model_name: {tmp_path}}}, data: {{path: rows.jsonl}}, multi_gpu: {{num_processes: 2}}}}"
    )
    (tmp_path / "run.yaml").write_text(run)
    assert json.loads(python("-c", STARTS_RANKS, cwd=tmp_path)) == [2, [], True]


@pytest.mark.promise("F13")
def test_help_answers_at_once():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        text = python("-m", "pantheraml", "--help")
        seconds.append(time.perf_counter() - start)
        assert "train" in text
    assert min(seconds) < MOST_HELP_SECONDS


def test_every_export_is_listed_once_and_alike():
    tree = ast.parse((ROOT / "pantheraml/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module.removeprefix("pantheraml.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == pantheraml._EXPORTS
    assert sorted({*typed, "__version__"}) == sorted(pantheraml.__all__)


@pytest.mark.promise("A1")
def test_every_export_is_defined_where_it_is_said_to_be():
    missing = []
    for name, module in pantheraml._EXPORTS.items():
        path = ROOT / "pantheraml" / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
        if name not in _defined(tree):
            missing.append(f"{name} in {path.relative_to(ROOT)}")
    assert not missing


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
