"""``python -m pantheraml`` is the ``pantheraml`` command."""

from __future__ import annotations

from pantheraml.cli.app import main

if __name__ == "__main__":
    main()
