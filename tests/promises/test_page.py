"""The page of promises is of now, and its rows have tests."""

from __future__ import annotations

import json

import pytest

from tests.promises.marks import TESTS, marked
from tests.promises.page import PAGE, build, state
from tests.promises.record import RESULTS
from tests.promises.rows import ROWS, Row


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == build(), (
        "type: python -m tests.promises (or --page for the page alone)"
    )


def test_every_row_has_a_test_and_every_mark_a_row():
    tests = marked()
    assert sorted(set(ROWS) - set(tests)) == []
    assert sorted(set(tests) - set(ROWS)) == []


def test_results_are_of_tests_that_are_there():
    tests = {name for names in marked().values() for name in names}
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert sorted(set(known) - tests) == []
    assert all((TESTS.parent / name.split("::")[0]).exists() for name in known)


@pytest.mark.parametrize(
    ("gpus", "tests", "results", "expected"),
    [
        (0, {}, {}, "**no test**"),
        (0, {"a": False}, {}, "**not run**"),
        (0, {"a": False}, {"a": {"skipped": 2}}, "**not run**"),
        (0, {"a": False, "b": False}, {"a": {"passed": 1}, "b": {"passed": 1, "failed": 1}}, "**fails**"),
        (0, {"a": False}, {"a": {"passed": 1}}, "green"),
        (2, {"a": False}, {"a": {"passed": 1}}, "**no test on GPUs**"),
        (2, {"a": False, "g": True}, {"a": {"passed": 1}}, "**to be run on GPUs**"),
        (2, {"a": False, "g": True}, {"a": {"passed": 1}, "g": {"passed": 1}}, "green"),
    ],
)  # fmt: skip
def test_a_row_is_green_when_all_that_shows_it_has_passed(gpus, tests, results, expected):
    assert state(Row("Z1", "", gpus), tests, results) == expected
