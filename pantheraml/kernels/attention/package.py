"""Functions of attention packages that may or may not be installed."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

ABSENT = "not installed"
# How the reason of a package begins that is installed and does not load.
UNUSABLE = "cannot be used"


@lru_cache(maxsize=8)
def _find(module: str, names: tuple[str, ...]) -> tuple[Any, ...] | str:
    try:
        found = import_module(module)
        return tuple(getattr(found, name) for name in names)
    except ModuleNotFoundError as error:
        parents = module.split(".")
        if error.name in {".".join(parents[: depth + 1]) for depth in range(len(parents))}:
            return ABSENT
        return f"{UNUSABLE}: {error}"
    except Exception as error:  # a package built for another torch raises whatever it likes
        return f"{UNUSABLE}: {type(error).__name__}: {str(error).strip()[:160]}"


def why_absent(module: str, *names: str) -> str | None:
    """Why ``module`` has no such functions: ``ABSENT``, or what importing it raised; None when it has."""
    found = _find(module, names)
    return found if isinstance(found, str) else None


def functions(module: str, *names: str) -> tuple[Any, ...]:
    """The named functions of ``module``, once ``why_absent`` said None."""
    found = _find(module, names)
    assert not isinstance(found, str), found
    return found
