"""What the page of troubles quotes is what our messages say."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


def quotes():
    """Texts in the column of what happens here, in parts where some of it is left out."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = line.split(" | ")
        for quote in re.findall(r"`([^`]+)`", cells[1]) if len(cells) == 3 else ():
            if " " in quote and not quote.startswith(("python", "pantheraml")):
                yield from (part.strip(" ,") for part in quote.split("..."))


def test_messages_are_ours():
    said = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "errors" / "golden").iterdir()]
    said += [path.read_text(encoding="utf-8") for path in (ROOT / "pantheraml").rglob("*.py")]
    found = list(quotes())
    assert len(found) >= 5
    assert [quote for quote in found if not any(quote in text for text in said)] == []
