"""``docs/promises.md`` from the rows, the marks and the results."""

from __future__ import annotations

import json
from pathlib import Path

from tests.promises.marks import marked
from tests.promises.record import RESULTS
from tests.promises.rows import ROWS, SECTIONS, Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "promises.md"
HEAD = """# What is promised, and what shows it

Each row is a promise of the guides PantheraML is written after. A test that shows one is marked with it,
`@pytest.mark.promise("A3")`; this page is written from those tests' results by

<!-- not run: takes minutes, and writes this page -->
```bash
python -m tests.promises        # on a machine with GPUs: the tests that need them
```

A row is green when every test marked with it has passed, and at least one on GPUs where it takes GPUs to show it.
"""


def state(row: Row, tests: dict[str, bool], results: dict[str, dict]) -> str:
    """``green``, or what is missing."""
    if not tests:
        return "**no test**"
    if any(results.get(test, {}).get("failed") for test in tests):
        return "**fails**"
    open_ones = [test for test in tests if not results.get(test, {}).get("passed")]
    if any(not tests[test] for test in open_ones):
        return "**not run**"
    if open_ones:
        return "**to be run on GPUs**"
    if row.gpus and not any(tests.values()):
        return "**no test on GPUs**"
    return "green"


def build(results: dict[str, dict] | None = None) -> str:
    """The text of the page."""
    if results is None:
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    tests = marked()
    states = {key: state(row, tests.get(key, {}), results) for key, row in ROWS.items()}
    green = sum(value == "green" for value in states.values())
    lines = [HEAD, f"**{green} of {len(ROWS)} rows are green.**"]
    for letter, (title, rows) in SECTIONS.items():
        lines += [
            "",
            f"## {letter}. {title}",
            "",
            "| row | what holds | state | shown by |",
            "|---|---|---|---|",
        ]
        for row in rows:
            shown = "<br>".join(_test(name, results) for name in tests.get(row.key, {})) or "—"
            lines.append(f"| {row.key} | {row.promise} | {states[row.key]} | {shown} |")
    machines = sorted(
        {results[name]["where"] for names in tests.values() for name in names if name in results}
    )
    lines += ["", "## Where", "", *(f"{number}. {name}" for number, name in enumerate(machines, 1))]
    return "\n".join(lines) + "\n"


def _test(name: str, results: dict[str, dict]) -> str:
    path, function = name.split("::")
    known = results.get(name, {})
    counts = [f"{known[kind]} {kind}" for kind in ("passed", "failed", "skipped") if known.get(kind)]
    return f"[{function.removeprefix('test_')}](../{path}): {', '.join(counts) or 'not run'}"
