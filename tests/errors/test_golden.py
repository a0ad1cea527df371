"""What users read when something is wrong: one paragraph each, kept word for word in ``golden/``.

``python -m tests.errors.accept`` rewrites the texts after a change that was meant.
"""

from __future__ import annotations

import difflib
import re

import pytest

from tests.errors.workshop import CASES, GOLDEN, CannotHappenHere, Workshop, error_of, golden_text, load_cases

load_cases()
# The texts that list several problems.
LISTS = {"run_file_with_three_problems", "run_file_with_scattered_gpus"}


@pytest.fixture(scope="module")
def shop():
    shop = Workshop()
    yield shop
    shop.close()


@pytest.mark.promise("F14")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets, after a table that fails
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_text_is_the_golden_one(name, shop):
    try:
        error = error_of(name, shop)
    except CannotHappenHere as reason:
        pytest.skip(str(reason))
    file = GOLDEN / f"{name}.txt"
    golden = file.read_text(encoding="utf-8") if file.exists() else ""
    text = golden_text(error, shop)
    difference = "\n".join(
        difflib.unified_diff(golden.split(), text.split(), "golden", "now", lineterm="", n=6)
    )
    assert text == golden, f"{difference}\n\nIf this is meant: python -m tests.errors.accept {name}"
    if name in LISTS:
        return
    assert error.got and error.need and error.fix, "what we got, what is needed, what to type"
    for part in (error.got, error.need, error.fix):
        assert part[-1] in ".?", f"not a sentence: {part}"
        assert not re.search(r"\s\s|\.\.|\n| \.$|<class", part.replace("...", "")), part


@pytest.mark.promise("F14")
def test_there_is_no_text_without_a_case():
    assert sorted(file.stem for file in GOLDEN.glob("*.txt")) == sorted(CASES)
