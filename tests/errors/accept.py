"""``python -m tests.errors.accept [NAME ...]``: rewrite the golden texts with what is raised now."""

from __future__ import annotations

import sys

from tests.errors import workshop


def main(names: list[str]) -> None:
    workshop.offline()
    workshop.load_cases()
    chosen = names or sorted(workshop.CASES)
    for name in chosen:
        shop = workshop.Workshop()
        try:
            text = workshop.golden_text(workshop.error_of(name, shop), shop)
        except workshop.CannotHappenHere as reason:
            print(f"{name}: left as it is, {reason}")
            continue
        finally:
            shop.close()
        (workshop.GOLDEN / f"{name}.txt").write_text(text, encoding="utf-8")
        print(text)
    for file in workshop.GOLDEN.glob("*.txt"):
        if file.stem not in workshop.CASES:
            file.unlink()
            print(f"{file.name}: no case of that name, removed")


if __name__ == "__main__":
    main(sys.argv[1:])
