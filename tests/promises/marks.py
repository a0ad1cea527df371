"""Which test shows which promise: read from the marks in the source, without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def marked() -> dict[str, dict[str, bool]]:
    """``{"A3": {"tests/launch/test_agent.py::test_…": needs a GPU}}`` for all tests with ``@pytest.mark.promise``."""
    found: dict[str, dict[str, bool]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if "promise(" not in source:
            continue
        tree = ast.parse(source)
        of_file = getattr(_assigned(tree, "pytestmark"), "value", None)
        whole_file, gpu_file = _keys(of_file), _names_gpu(of_file)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = f"{path.relative_to(TESTS.parent).as_posix()}::{node.name}"
                gpu = gpu_file or any(_names_gpu(mark) for mark in node.decorator_list)
                for key in whole_file + [key for mark in node.decorator_list for key in _keys(mark)]:
                    found.setdefault(key, {})[name] = gpu
    return found


def _assigned(tree: ast.Module, name: str) -> ast.Assign | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return node
    return None


def _keys(mark: ast.AST | None) -> list[str]:
    """The rows named by ``pytest.mark.promise("A1", "B2")``, alone or in a list of marks."""
    return [
        argument.value
        for call in ast.walk(mark or ast.Module([], []))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "promise"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]


def _names_gpu(mark: ast.AST | None) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == "gpu"
        for node in ast.walk(mark or ast.Module([], []))
    )
