"""Installed versions against the ranges that the package asks for, and against those known to fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding
from pantheraml.doctor.known_bad import KNOWN_BAD, KnownBad

NAME = "versions"


@dataclass(frozen=True)
class Facts:
    """What is installed.

    Attributes:
        installed: version of each package, by its canonical name.
        required: what PantheraML asks for (``trl>=1.15``); None where it is not installed, so that nobody knows.
        gpus: on this machine.
    """

    installed: Mapping[str, str]
    required: tuple[str, ...] | None
    gpus: int


def probe(gpus: int) -> Facts:
    """Read what pip has written; nothing is imported."""
    try:
        lines = metadata.requires("pantheraml") or []
    except metadata.PackageNotFoundError:
        required = None
    else:
        found = map(Requirement, lines)
        required = tuple(
            str(one) for one in found if one.marker is None or one.marker.evaluate({"extra": ""})
        )
    names = [Requirement(one).name for one in required or ()]
    names += [name for one in KNOWN_BAD for name in (one.package, *one.beside)]
    return Facts(_versions(names), required, gpus)


def _versions(names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[canonicalize_name(name)] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def judge(facts: Facts, known: tuple[KnownBad, ...] = KNOWN_BAD) -> list[Finding]:
    """A row for each bad version, or one that counts."""
    found = [_judge_range(Requirement(one), facts) for one in facts.required or ()]
    found += [_judge_known(one, facts) for one in known]
    wrong = [one for one in found if one is not None]
    if facts.required is None:
        seen = "PantheraML runs without being installed, so nobody knows its ranges"
        wrong.append(Finding(NAME, "note", seen, "Type pip install -e . in its folder."))
    if wrong:
        return wrong
    return [Finding(NAME, "ok", f"{len(facts.required or ())} packages in their ranges, none known to fail")]


def _judge_range(required: Requirement, facts: Facts) -> Finding | None:
    version = facts.installed.get(canonicalize_name(required.name))
    install = f"Type pip install '{required.name}{required.specifier}'."
    if version is None:
        return Finding(NAME, "bad", f"{required.name} is not installed", install)
    if required.specifier.contains(version, prereleases=True):
        return None
    return Finding(NAME, "bad", f"{required.name} {version}, supported is {required.specifier}", install)


def _judge_known(bad: KnownBad, facts: Facts) -> Finding | None:
    def has(package: str, versions: str) -> bool:
        version = facts.installed.get(package)
        return version is not None and SpecifierSet(versions).contains(version, prereleases=True)

    if bad.where == "no gpu" and facts.gpus:
        return None
    if not has(bad.package, bad.versions) or not all(has(*one) for one in bad.beside.items()):
        return None
    others = "".join(f" with {name} {facts.installed[name]}" for name in bad.beside)
    return Finding(
        NAME, bad.state, f"{bad.package} {facts.installed[bad.package]}{others}: {bad.why}", bad.fix
    )


CHECK = Check(NAME, probe, judge, if_it_fails="Type pip check.", counts=True)
