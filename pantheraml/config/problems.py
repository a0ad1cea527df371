"""Check settings, and say in sentences what is wrong with each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pantheraml.config.conflicts import Conflicts
from pantheraml.config.names import KNOWN_ELSEWHERE
from pantheraml.config.run import RunConfig
from pantheraml.config.source import KeyPath
from pantheraml.errors import did_you_mean

_SECTIONS = ("model", "lora", "data", "trainer", "save", "multi_gpu")
# Those that may be missing; in YAML, an empty section is null as well.
_OPTIONAL = ("lora", "multi_gpu")
_SECRET = {("model", "token")}
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Finding:
    """Something wrong with the settings at ``paths``, as sentences."""

    paths: tuple[KeyPath, ...]
    text: str


@cache
def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, for editors and for the error messages."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "PantheraML run"}


def check(data: dict[str, Any]) -> tuple[RunConfig | None, list[Finding]]:
    """Validate ``data`` and find everything that is wrong with it.

    A wrong setting is taken out and the rest is checked again, so that settings which do not fit together
    are found beside misspelt ones. What then follows only from the removal is not reported.

    Returns:
        The configuration and no findings, or None with at least one.
    """
    data = _plain(data)
    for section in _SECTIONS:
        if section not in _OPTIONAL and section in data and data[section] is None:
            data[section] = {}
    findings: list[Finding] = []
    removed: set[KeyPath] = set()
    while True:
        try:
            config = RunConfig.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            return (None if findings else config), findings
        carried = details[0].get("ctx", {}).get("error")
        if isinstance(carried, Conflicts):
            for conflict in carried.conflicts:
                paths = tuple(tuple(path.split(".")) for path in conflict.paths)
                if not any(path[: len(gone)] == gone for path in paths for gone in removed):
                    findings.append(Finding(paths, conflict.text))
            return None, findings
        wrong = _by_setting(details, data)
        findings += [Finding((path,), text) for path, text in wrong.items() if path not in removed]
        for path in wrong:
            removed.add(_take_out(data, path))


def _plain(value: Any) -> Any:
    """A copy of nested mappings and lists whose keys are text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value


def _by_setting(details: list[ErrorDetails], data: dict[str, Any]) -> dict[KeyPath, str]:
    """What is wrong with each setting; the branches of a union each bring an error of their own."""
    wrong: dict[KeyPath, str] = {}
    for detail in details:
        path = _setting_path(detail)
        name = ".".join(path)
        if detail["type"] == "missing":
            wrong[path] = f"{name} is missing; it takes {_takes(path)}."
        elif detail["type"] in ("extra_forbidden", "invalid_key"):
            wrong[path] = f"there is no setting {name}. {_hint(path)}"
        elif path not in wrong:
            wrong[path] = f"{name} is {_shown(path, data)}; it takes {_takes(path)}."
    # "There is no setting a.b" says more than "a is {b: 1}; it takes ...".
    return {path: text for path, text in wrong.items() if not any(path == other[:-1] for other in wrong)}


def _setting_path(detail: ErrorDetails) -> KeyPath:
    """The setting an error is about: ``section.key`` or a top-level key, without an item's index."""
    steps = [str(step) for step in detail["loc"]]
    if detail["type"] in ("missing", "extra_forbidden", "invalid_key"):
        # Between the two may stand pydantic's name of a branch of a union.
        return (steps[0], steps[-1]) if len(steps) > 1 else (steps[0],)
    return tuple(steps[:2]) if steps[0] in _SECTIONS else (steps[0],)


def _take_out(data: dict[str, Any], path: KeyPath) -> KeyPath:
    """Remove a wrong setting, or fill in a missing name of a model; returns what was removed."""
    section: Any = data.get(path[0])
    if path in (("model",), ("model", "model_name")) and not (len(path) == 1 and section is not None):
        data["model"] = {**(section or {}), "model_name": "not given"}
    elif len(path) == 2 and path[0] in _SECTIONS:
        section.pop(path[1])
    else:
        path = path[:1]
        data.pop(path[0], None)  # may hold several wrong settings
    return path


def _shown(path: KeyPath, data: dict[str, Any]) -> str:
    if path in _SECRET:
        return "not text"
    value: Any = data
    for step in path:
        value = value[step]
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _hint(path: KeyPath) -> str:
    """Where an unknown setting probably belongs."""
    key, section = path[-1], path[0] if len(path) > 1 else ""
    homes: dict[str, list[str]] = {}
    for home in ("", *_SECTIONS):
        for name in _settings(home):
            homes.setdefault(name, []).append(f"{home}.{name}" if home else name)
    if key in homes:
        return f"It belongs elsewhere: write {' or '.join(homes[key])}."
    if key in KNOWN_ELSEWHERE:
        return f"Write {KNOWN_ELSEWHERE[key]}."
    near = did_you_mean(key, _settings(section))
    if near:
        return near
    anywhere = difflib.get_close_matches(key, homes, n=1, cutoff=0.75)
    if anywhere:
        return f"Did you mean {' or '.join(repr(home) for home in homes[anywhere[0]])}?"
    return "`pantheraml schema` prints all settings."


def _settings(section: str) -> dict[str, Any]:
    """The JSON schemas of a section's settings, by name; of the top level for an empty name."""
    schema = json_schema()
    if not section:
        return schema["properties"]
    node: dict[str, Any] = schema["properties"].get(section, {})
    for branch in (node, *node.get("anyOf", ())):
        if "$ref" in branch:
            return schema["$defs"][branch["$ref"].rsplit("/", 1)[-1]]["properties"]
    return {}


def _takes(path: KeyPath) -> str:
    """What a setting takes, in words, from its JSON schema."""
    *section, name = path
    return _in_words(_settings("".join(section))[name])


def _in_words(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        branches = sorted(node["anyOf"], key=lambda branch: branch.get("type") == "null")
        return " or ".join(dict.fromkeys(_in_words(branch) for branch in branches))
    if "$ref" in node:
        return "a mapping of settings"
    if "const" in node or "enum" in node:
        return ", ".join(json.dumps(value) for value in node.get("enum", [node.get("const")]))
    kind: str = node.get("type", "")
    if kind in ("integer", "number"):
        return " ".join(["a whole number" if kind == "integer" else "a number", *_bounds(node)])
    if kind == "array":
        return f"a list (each item {_in_words(node['items'])})"
    if kind == "string" and "examples" in node:
        return f"text such as {', '.join(node['examples'])}"
    words = {"boolean": "true or false", "string": "text", "object": "a mapping", "null": "null"}
    return words.get(kind, "any value")


def _bounds(node: dict[str, Any]) -> Iterator[str]:
    bounds = {"minimum": "of at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    for key, words in bounds.items():
        if key in node:
            yield f"{words} {node[key]:g}"
