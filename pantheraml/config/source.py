"""YAML text as plain values, with the line of every key.

Scalars follow YAML 1.2: ``2e-4`` is a number, and ``no``, ``off`` and dates are text, so that
``eval_strategy: no`` and ``kernels: off`` mean what they say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pantheraml.errors import ConfigError

KeyPath = tuple[str, ...]

_PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
_FIRST = {"null": [*"~nN", ""], "bool": [*"tTfF"], "int": [*"-+0123456789"], "float": [*"-+.0123456789"]}
_TAG = "tag:yaml.org,2002:"
# Aliases can make a short text describe a huge or bottomless tree.
_MOST_VALUES = 20_000
_DEEPEST = 50


class _Loader(yaml.SafeLoader):
    """A safe loader with the plain scalars of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or YAML 1.2 would read as something else."""


def _add_resolvers(target: Any) -> None:
    for name, pattern in _PLAIN.items():
        target.add_implicit_resolver(_TAG + name, re.compile(f"(?:{pattern.pattern})$"), _FIRST[name])


_Loader.yaml_implicit_resolvers = {}
_add_resolvers(_Loader)
_add_resolvers(_Dumper)


class Place(NamedTuple):
    """Where a setting was written; sorts by line, with overrides last."""

    line: float
    label: str


class Problem(NamedTuple):
    """One thing that is wrong, and where."""

    place: Place
    text: str


@dataclass
class Source:
    """Settings as written: values, where each stands, and what was wrong with the text.

    ``label`` names the whole source, as ``run.yaml`` or ``override a=1``.
    """

    label: str
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    places: dict[KeyPath, Place] = field(default_factory=dict[KeyPath, Place])
    problems: list[Problem] = field(default_factory=list[Problem])

    def place(self, path: KeyPath) -> Place:
        """The place of ``path``, or of the nearest section around it that was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        within = [place for known, place in self.places.items() if known[: len(path)] == path]
        return min(within, default=Place(0, self.label))


def read_yaml(path: Path) -> Source:
    """Read the YAML file at ``path``.

    Raises:
        ConfigError: when the file cannot be read, is not YAML, is empty or is not a mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no run file {path}.",
            "A run is described by a YAML file with sections such as model: and data:.",
            f"Check the path; the current folder is {Path.cwd()}.",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text in UTF-8 (byte {error.start}), as YAML is.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The run file {path} cannot be read: {error}.") from None
    try:
        node = _compose(text)
    except _YamlFault as fault:
        where = f"{path}:{fault.line}" + (f", column {fault.column}" if fault.column else "")
        raise ConfigError(f"{where}: this is not YAML: {fault}.") from None
    if node is None:
        raise ConfigError(
            f"The run file {path} is empty.",
            "It needs at least a model section with model_name and a data section.",
            "`pantheraml schema` prints all settings.",
        )
    source = Source(str(path))
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{_line(node)}: the run file is not a mapping.",
            "It needs sections such as model: and data: at the top level.",
        )
    source.data = _Builder(source).build_mapping(node, ())
    return source


def parse_value(text: str) -> Any:
    """The value of a YAML text, such as ``1e-4``, ``null`` or ``[q_proj, v_proj]``.

    Raises:
        ValueError: when the text is not YAML; the message says why.
    """
    try:
        node = _compose(text)
    except _YamlFault as fault:
        raise ValueError(f"this is not YAML: {fault}.") from None
    if node is None:
        return None
    source = Source(text)
    value = _Builder(source).build(node, ())
    if source.problems:
        raise ValueError(source.problems[0].text)
    return value


def dump_yaml(data: dict[str, Any]) -> str:
    """``data`` as YAML text that :func:`parse_value` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _YamlFault(Exception):
    """A syntax error with its place in the text; ``line`` and ``column`` count from 1, 0 when unknown."""

    def __init__(self, text: str, line: int = 0, column: int = 0) -> None:
        super().__init__(text)
        self.line, self.column = line, column


def _compose(text: str) -> yaml.Node | None:
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in reason:
            reason = "a tab is used for indentation; use spaces"
        raise _YamlFault(reason, *((mark.line + 1, mark.column + 1) if mark else ())) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _YamlFault(f"character #x{error.character:04x} is not allowed", line) from None
    except RecursionError:
        raise _YamlFault("it is nested too deeply") from None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


class _Builder:
    """Turns YAML nodes into values, and notes the line of each key in ``source``."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.values = 0
        self.depth = 0
        self.too_large = False

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        if self.depth > _DEEPEST or self.values > _MOST_VALUES:
            if not self.too_large:
                self._problem(node, "The text is nested too deeply, or its aliases make it too large.")
            self.too_large = True
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self.depth += 1
        try:
            if isinstance(node, yaml.MappingNode):
                return self.build_mapping(node, path)
            return [self.build(item, (*path, str(index))) for index, item in enumerate(node.value)]
        finally:
            self.depth -= 1

    def build_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, "A setting's name must be a word, not a list or a mapping.")
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in data:
                name, first = ".".join(here), self.source.places[here].label
                self._problem(key_node, f"{name} is given twice (first at {first}). Keep one of them.")
                continue
            self.source.places[here] = self._place(key_node)
            data[key] = self.build(value_node, here)
        return data

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "str":
            return text
        if kind not in _PLAIN or not _PLAIN[kind].fullmatch(text):
            tag = node.tag.replace(_TAG, "!!")
            self._problem(node, f"The tag {tag} does not fit {text[:40]!r}. Remove the tag.")
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        try:
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        except ValueError:  # more digits than Python converts
            return text

    def _place(self, node: yaml.Node) -> Place:
        return Place(_line(node), f"{self.source.label}:{_line(node)}")

    def _problem(self, node: yaml.Node, text: str) -> None:
        self.source.problems.append(Problem(self._place(node), text))
