"""The reference is that of the docstrings of now."""

from __future__ import annotations

import pantheraml
from tests.docs.reference import PAGE, reference


def test_the_page_has_the_docstrings_of_now():
    assert PAGE.read_text(encoding="utf-8") == reference(), "type: python -m tests.docs.reference"


def test_everything_public_is_in_it_and_says_something():
    parts = {part.splitlines()[0]: part for part in PAGE.read_text(encoding="utf-8").split("\n## ")}
    for name in pantheraml.__all__:
        if name != "__version__":
            assert len(parts[name].split("```")[-1].strip()) > 20, name
