"""Which checkpoint a run goes on from, and why not another one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from pantheraml.checkpoint.folder_files import files_below, reason_of, shown
from pantheraml.checkpoint.manifest import has_manifest, problems
from pantheraml.checkpoint.names import OPTIMIZER, checkpoints, step_of
from pantheraml.checkpoint.pointers import LATEST, pointer_path, read_pointer
from pantheraml.checkpoint.unfinished import recover
from pantheraml.errors import CheckpointError
from pantheraml.models.tensor_header import BadHeader, read_header

STATE = "trainer_state.json"
_WEIGHTS = ("*model*.safetensors", "*model*.bin", "*model*.index.json", "*.distcp")
NO_WEIGHTS = "No weights are in it: no model.safetensors, no adapter_model.safetensors, no shards."


@dataclass(frozen=True)
class PassedOver:
    """Something that a run does not resume from.

    Args:
        name: of the checkpoint, the pointer or the hidden folder.
        reasons: sentences, each of which names its file.
    """

    name: str
    reasons: list[str]

    def __str__(self) -> str:
        return f"{self.name} is passed over: {' '.join(self.reasons)}"


@dataclass(frozen=True)
class Choice:
    """What a run resumes from.

    Args:
        folder: the checkpoint; None if there is none.
        is_checked: a manifest proves that it is whole; plain checkpoints of transformers have none.
        passed_over: what was looked at before it.
    """

    folder: Path | None
    is_checked: bool = False
    passed_over: list[PassedOver] = field(default_factory=list)


def newest_whole(
    run_folder: str | Path, *, hashes: bool = True, end_saves: bool = True, most: int | None = None
) -> Choice:
    """The checkpoint that ``latest`` names if it is whole, else the newest whole one. Rank 0 does this.

    Args:
        run_folder: the run's folder; it need not be there.
        hashes: read all files and compare their SHA-256; else sizes alone are compared.
        end_saves: first end or remove what killed processes left (``recover``).
        most: up to which step; other machines, with disks of their own, have no newer one.
    """

    def judge(folder: Path) -> list[str]:
        is_alone = most is not None and (step_of(folder.name) or 0) > most
        found = damage(folder, hashes=hashes)
        return found or (["Another machine has no whole one of this step."] if is_alone else [])

    passed = [PassedOver(name, [said]) for name, said in (recover(run_folder) if end_saves else [])]
    choice = choose(Path(run_folder), judge)
    return Choice(choice.folder, choice.is_checked, [*passed, *choice.passed_over])


def choose(run_folder: Path, judge: Callable[[Path], list[str]]) -> Choice:
    """The first checkpoint, ``latest``'s before newer before older ones, that ``judge`` says nothing against."""
    passed: list[PassedOver] = []
    try:
        candidates = checkpoints(run_folder)[::-1]
    except OSError as error:
        return Choice(
            None, passed_over=[PassedOver(run_folder.name, [f"It cannot be read ({reason_of(error)})."])]
        )
    try:
        pointer = read_pointer(run_folder, LATEST)
    except CheckpointError as error:
        passed.append(PassedOver(pointer_path(run_folder, LATEST).name, [error.got]))
    else:
        if pointer is not None:  # a stable sort: the others keep their order
            candidates.sort(key=lambda path: path.name != pointer.checkpoint)
    for folder in candidates:
        reasons = judge(folder)
        if not reasons:
            return Choice(folder, has_manifest(folder), passed)
        passed.append(PassedOver(folder.name, reasons))
    return Choice(None, passed_over=passed)


def damage(folder: Path, *, hashes: bool = True) -> list[str]:
    """Why a run cannot resume from a checkpoint, one sentence each; ``hashes`` as for ``newest_whole``."""
    return problems(folder, hashes=hashes) if has_manifest(folder) else plain_problems(folder)


def plain_problems(folder: Path) -> list[str]:
    """What can be seen to be wrong with a checkpoint that has no manifest, one sentence each."""
    try:
        names = [name for name, found in files_below(folder).items() if found.kind in ("file", "link")]
    except OSError as error:
        return [f"{folder.name} cannot be read ({reason_of(error)})."]
    wrong = [f"{STATE} {reason}." for reason in filter(None, [json_problem(folder / STATE)])]
    if not has_weights(names):
        wrong.append(NO_WEIGHTS)
    for name in names:
        if name.endswith(".safetensors"):
            try:
                read_header(folder / name)
            except BadHeader as error:
                wrong.append(f"{shown(name)} {error}.")
    return wrong


def why_none(folder: Path) -> str:
    """Why a folder is no checkpoint at all, in a sentence; empty if it is one, whole or damaged."""
    if not folder.is_dir():
        return "There is no such folder."
    return "" if (folder / STATE).exists() else f"No {STATE} is in it."


def has_weights(names: Iterable[str]) -> bool:
    """Whether one of these files holds weights, whole or in part."""
    paths = [PurePosixPath(name) for name in names]
    of_weights = [path.name for path in paths if not path.parts[0].startswith(OPTIMIZER)]
    return any(fnmatch(name, known) for name in of_weights for known in _WEIGHTS)


def json_problem(path: Path) -> str:
    """What is wrong with a JSON file, as the rest of a sentence that begins with its name; empty if nothing."""
    try:
        if path.exists() and not path.is_file():
            return "is no plain file"
        return "" if isinstance(json.loads(path.read_text(encoding="utf-8")), dict) else "is no JSON object"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({reason_of(error)})"
    except (ValueError, RecursionError):
        return "is damaged or was cut short: it is no JSON"
