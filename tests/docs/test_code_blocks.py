"""The code in README.md and docs/ runs as it is printed."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from pantheraml import cleanup_multi_gpu
from pantheraml.cli.app import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# How many blocks of each page are marked as not run. A new one belongs here, with its reason in the page.
NOT_RUN = {
    "docs/any-pytorch-model.md": 1, "docs/attention.md": 1, "docs/exactness.md": 1, "docs/grpo.md": 1,
    "docs/memory.md": 1, "docs/multi-gpu.md": 3, "docs/parallelism-pipeline.md": 1, "docs/parallelism-tensor.md": 1,
    "docs/performance.md": 1,
    "docs/planner.md": 1, "docs/promises.md": 1, "docs/quick-start.md": 1,
}  # fmt: skip

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"`(pantheraml (?:train|schema|version)[^`]*)`")


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its first line of code, ``reason`` why it is not run."""

    language: str
    code: str
    line: int
    reason: str | None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(text: str) -> list[Block]:
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, found["reason"])
        for found in FENCE.finditer(text)
    ]


def pages_with(language: str):
    pages = [page for page in PAGES if any(b.language == language for b in blocks_of(page.read_text()))]
    return pytest.mark.parametrize("page", pages, ids=name_of)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """The random base model that `make demo` leaves behind."""
    from pantheraml.data.debug_dataset import load_debug_dataset
    from pantheraml.demo.base_model import build_base_model

    folder = tmp_path_factory.mktemp("demo") / "base-model"
    build_base_model(folder, map(str, load_debug_dataset()))
    return folder


@pytest.fixture
def clone(tmp_path, monkeypatch, base_model):
    """A folder like a clone after `make demo`, as the current one."""
    for part in ("pantheraml/data/debug", "examples/configs"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copytree(base_model, tmp_path / "demo-output/base-model")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    cleanup_multi_gpu()  # each page is a run of its own


@pages_with("python")
def test_python_blocks_run_one_after_another(page, clone):
    """The blocks of a page share their names, as if they were pasted into one session."""
    names: dict[str, object] = {}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.reason is None:
            # Lines are numbered as in the page, so that an error points at it.
            script = clone / f"{page.stem}.py"
            script.write_text("\n" * (block.line - 1) + block.code, encoding="utf-8")
            names = runpy.run_path(str(script), init_globals=names)
    assert names["__file__"]


def run_command(line: str, targets: set[str]) -> None:
    """Run one command of a page; training is only checked, and `make` only has to know its target."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        assert words[1] in targets, line
        return
    assert words[:1] == ["pantheraml"], f"mark the block as not run, or test this command: {line}"
    dry = ["--dry-run"] if words[1] == "train" and "--dry-run" not in words else []
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], *dry])
    assert ended.value.code == 0, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_work(page, clone, capsys):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [
        command
        for command in INLINE.findall(FENCE.sub("", text))
        if any(Path(word).is_file() for word in command.split())  # others speak of a file of the reader's
    ]
    for block in blocks_of(text):
        if block.language == "bash" and block.reason is None:
            commands += block.code.splitlines()
    for line in filter(str.strip, commands):
        run_command(line, targets)


def test_blocks_that_are_not_run_are_counted():
    skipped = {
        name_of(page): [block.reason for block in blocks_of(page.read_text(encoding="utf-8")) if block.reason]
        for page in PAGES
    }
    assert {name: len(reasons) for name, reasons in skipped.items() if reasons} == NOT_RUN
    python = [
        b for page in PAGES for b in blocks_of(page.read_text(encoding="utf-8")) if b.language == "python"
    ]
    assert len(python) > 8, "the pages' blocks are no longer found"


def test_a_mark_applies_to_the_block_right_after_it():
    first, second = blocks_of(
        "text\n<!-- not run: needs a GPU -->\n```python\na\n```\n\n```bash\nb\n```\n```yaml\nc\n```\n"
    )
    assert (first.reason, first.line, first.code) == ("needs a GPU", 4, "a\n")
    assert (second.language, second.reason, second.line) == ("bash", None, 8)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"
