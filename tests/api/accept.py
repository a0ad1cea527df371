"""``python -m tests.api.accept``: store today's public surface; the difference is printed."""

from __future__ import annotations

import json
import os
from difflib import unified_diff

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.api.surface import STORED, lines, stored, surface


def main() -> None:
    before, now = stored() if STORED.exists() else {}, surface()
    STORED.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    print(*unified_diff(lines(before), lines(now), "stored", "now", lineterm="", n=0), sep="\n")


if __name__ == "__main__":
    main()
