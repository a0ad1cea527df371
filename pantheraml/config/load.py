"""Read a run's settings from a YAML file or a mapping, and write them back.

Whatever is wrong is reported in one ``ConfigError``: every problem, where it stands, what was given, what
is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from pantheraml.config.names import SECTION_ALIASES
from pantheraml.config.problems import Finding, check, json_schema
from pantheraml.config.run import RunConfig, rename_sections, sections_named_twice
from pantheraml.config.source import KeyPath, Place, Problem, Source, dump_yaml, parse_value, read_yaml
from pantheraml.errors import ConfigError

__all__ = ["dump_config", "json_schema", "load_config", "parse_config"]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check the run file at ``path``.

    Args:
        path: a YAML file.
        overrides: settings that replace those of the file, such as ``trainer.learning_rate=1e-4``; values
            are YAML.

    Raises:
        ConfigError: when the file cannot be read, or with every problem of its settings.
    """
    return _finish(read_yaml(Path(path)), overrides)


def parse_config(data: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Check settings that are already in memory, as :func:`load_config` does with those of a file.

    Raises:
        ConfigError: with every problem of the settings.
    """
    return _finish(Source("settings", dict(data)), overrides)


def dump_config(config: RunConfig) -> str:
    """The resolved settings as YAML that ``load_config`` reads back; Hub tokens are left out."""
    data = config.model_dump()
    extra = {key: value for key, value in config.trainer.extra.items() if key != "hub_token"}
    data["trainer"] = config.trainer.given() | ({"extra": extra} if extra else {})
    return dump_yaml(data)


def _finish(source: Source, overrides: Iterable[str]) -> RunConfig:
    for name, alias in sections_named_twice(source.data):
        text = f"{name} and {alias} are two names of one section. Keep one of them."
        source.problems.append(Problem(_places(source, ((name,), (alias,))), text))
    source.data = rename_sections(source.data)
    source.places = {_renamed(path): place for path, place in source.places.items()}
    for override in overrides:
        _apply(override, source)
    config, findings = check(source.data)
    problems = [*source.problems, *(_located(finding, source) for finding in findings)]
    if config is not None and not problems:
        return config
    problems.sort(key=lambda problem: problem.place.line)
    lines = [f"{problem.place.label}: {problem.text}" for problem in problems]
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError("\n  ".join([f"{source.label} has {len(lines)} problems:", *lines]))


def _apply(override: str, source: Source) -> None:
    """Set one ``key=value`` in ``source``; what is wrong with it is added to the source's problems."""
    key, equals, text = override.partition("=")
    path = _renamed(tuple(key.strip().split(".")))
    place = Place(math.inf, f"override {key.strip() or override}")
    try:
        if not equals or not all(path):
            raise ValueError("it is written key=value, such as trainer.learning_rate=1e-4.")
        _set(source.data, path, parse_value(text))
    except ValueError as error:
        source.problems.append(Problem(place, str(error)))
        return
    below = [known for known in source.places if known[: len(path)] == path]
    for known in below:
        del source.places[known]
    source.places[path] = place


def _renamed(path: KeyPath) -> KeyPath:
    return (SECTION_ALIASES.get(path[0], path[0]), *path[1:])


def _set(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    for depth, step in enumerate(path[:-1], start=1):
        inner = data.get(step)
        if inner is None:
            inner = data[step] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(path[:depth])} is not a mapping; give its whole value.")
        data = cast("dict[str, Any]", inner)
    data[path[-1]] = value


def _located(finding: Finding, source: Source) -> Problem:
    return Problem(_places(source, finding.paths), finding.text)


def _places(source: Source, paths: tuple[KeyPath, ...]) -> Place:
    """The places of all ``paths`` that were written; the nearest section of the first when none was."""
    written = sorted({source.places[path] for path in paths if path in source.places})
    if not written:
        return source.place(paths[0])
    return Place(written[0].line, " and ".join(place.label for place in written))
