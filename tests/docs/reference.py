"""docs/reference.md, of the docstrings of everything public: ``python -m tests.docs.reference``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
HEAD = """# Reference

Every public name with its docstring, written by `python -m tests.docs.reference`. All of them come from `pantheraml`,
unless another place is named; each is loaded when it is first used.
"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")


def reference() -> str:
    """The text of the page."""
    import pantheraml
    from pantheraml import errors, utils
    from pantheraml.kernels import utils as gpu_helpers

    parts = [HEAD]
    named: dict[int, str] = {}
    for name in pantheraml.__all__:
        value = getattr(pantheraml, name)
        if not callable(value):
            continue
        first = named.setdefault(id(value), name)
        parts.append(
            f"## {name}\n\nThe same as [{first}](#{first.lower()}).\n"
            if first != name
            else entry(name, value)
        )
    parts.append("## Methods of models\n\nOf what `from_pretrained` and `get_peft_model` return.\n")
    parts += [entry(f"model.{name}", value, 3) for name, value in _saving_methods()]
    for title, module in (
        ("pantheraml.utils", utils),
        ("pantheraml.kernels.utils", gpu_helpers),
        ("pantheraml.errors", errors),
    ):
        parts.append(f"## {title}\n\n{_text(module)}")
        parts += [entry(name, value, 3) for name, value in _public(module)]
    return "\n".join(parts)


def entry(name: str, value: Any, level: int = 2) -> str:
    """A heading, the call, the docstring, and below it the methods of a class."""
    lines = ["#" * level + f" {name}", ""]
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    call = "" if is_error else _call(name, value)
    if call:
        lines += ["```text", call, "```", ""]
    lines.append(_text(value))
    if inspect.isclass(value) and not is_error:
        for method, function in vars(value).items():
            function = function.__func__ if isinstance(function, staticmethod | classmethod) else function
            if method[0] != "_" and inspect.isfunction(function) and function.__doc__:
                lines.append(entry(f"{name}.{method}", function, level + 1))
    return "\n".join(lines)


def _saving_methods() -> Iterator[tuple[str, Any]]:
    from pantheraml.export import model_methods
    from tests.api.surface import SAVING_METHODS

    for name in SAVING_METHODS:
        value = getattr(model_methods, name, None)
        if value is not None:
            yield name, value


def _public(module: Any) -> Iterator[tuple[str, Any]]:
    """What a module defines itself, errors without the functions that write their texts, and the GPU helpers."""
    from tests.api.surface import GPU_HELPERS

    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", "") == module.__name__ and inspect.isclass(value)
        if name in GPU_HELPERS or (is_own and name[0] != "_") or name.endswith("Manager"):
            yield name, value


def _call(name: str, value: Any) -> str:
    """The call, a parameter a line where it is long; empty where nobody makes one."""
    if inspect.isclass(value) and (issubclass(value, Enum) or "__init__" not in vars(value)):
        return ""
    own = vars(value).get("__annotations__", {})
    inherits = dataclasses.is_dataclass(value) and any(map(dataclasses.is_dataclass, value.__mro__[1:]))
    parameters = [
        str(one.replace(annotation=one.empty))
        for one in inspect.signature(value).parameters.values()
        if one.name != "self" and (not inherits or one.name in own)
    ]
    parameters += ["**fields of the base"] if inherits else []
    short = f"{name}({', '.join(parameters)})"
    return short if len(short) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + ",\n)"


def _text(value: Any) -> str:
    """A docstring as Markdown: entries of a section as a list."""
    lines: list[str] = []
    in_section = False
    for line in (inspect.getdoc(value) or "").splitlines():
        title = line.removesuffix(":")
        if title in _SECTIONS and line.endswith(":"):
            in_section = True
            lines += [f"**{title}**", ""]
        elif in_section and re.match(r"    \S", line):
            lines.append(
                re.sub(r"^    ([\w*, .]+):", r"- `\1`:", line) if ":" in line else f"- {line.strip()}"
            )
        elif in_section and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            in_section = in_section and not line.strip()
            lines.append(line)
    return re.sub(r"``([^`]+)``", r"`\1`", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
