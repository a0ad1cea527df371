"""Everything that can be checked about a checkpoint or a saved model without a GPU, told line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pantheraml.checkpoint.disk_errors import size_text
from pantheraml.checkpoint.folder_files import files_below, reason_of, shown
from pantheraml.checkpoint.manifest import MANIFEST, Manifest, has_manifest, read_manifest
from pantheraml.checkpoint.names import UNFINISHED, checkpoints, step_of
from pantheraml.checkpoint.pointers import POINTERS, pointer_path, read_pointer
from pantheraml.checkpoint.resuming import NO_WEIGHTS, STATE, damage, has_weights, json_problem
from pantheraml.checkpoint.tensor_files import empty_adapter, load_all, shapes_text
from pantheraml.errors import CheckpointError
from pantheraml.models.tensor_header import BadHeader, Tensor, read_header

_JSON = (STATE, "config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json")
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Args:
        verdict: ``note`` is neither right nor wrong.
        name: of the file or folder.
        text: what was found.
    """

    verdict: Literal["ok", "wrong", "note"]
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<7}{shown(self.name)}: {self.text}"


@dataclass(frozen=True)
class Inspection:
    """What was found in a checkpoint.

    Args:
        findings: each checked thing.
        damage: why a run cannot resume from it, if it cannot.
    """

    findings: list[Finding]
    damage: list[str]

    @property
    def num_wrong(self) -> int:
        """How many things are wrong."""
        return sum(finding.verdict == "wrong" for finding in self.findings)


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds checkpoints, or saves that were killed, or pointers.

    Raises:
        OSError: it cannot be listed.
    """
    return bool(
        checkpoints(folder)
        or any(pointer_path(folder, which).exists() for which in POINTERS)
        or any(folder.glob(f"{UNFINISHED}*"))
    )


def inspect_checkpoint(folder: Path, *, load: bool = False) -> Inspection:
    """Check the files of a checkpoint, or of a saved model or adapter.

    Args:
        folder: with the files.
        load: also load every tensor of the weights.
    """
    try:
        names = [name for name, found in files_below(folder).items() if found.kind == "file"]
    except OSError as error:
        return Inspection([Finding("wrong", folder.name, f"It cannot be read ({reason_of(error)}).")], [])
    is_checked, is_saved_run = has_manifest(folder), step_of(folder.name) is not None or STATE in names
    reasons = damage(folder) if is_checked or is_saved_run else []
    findings = [
        *_manifest(folder, reasons, set(names)),
        *_tensors(folder, names, load),
        *_json(folder, names),
    ]
    said = tuple(f"{finding.name} " for finding in findings if finding.verdict == "wrong")
    # What plain checkpoints lack; damaged files are among the findings already.
    findings += [
        Finding("wrong", folder.name, reason)
        for reason in reasons
        if not is_checked and not reason.startswith(said)
    ]
    if not has_weights(names) and NO_WEIGHTS not in reasons:
        findings.append(Finding("wrong", folder.name, NO_WEIGHTS))
    return Inspection(findings, reasons)


def inspect_pointers(run_folder: Path) -> list[Finding]:
    """Check what ``latest`` and ``best`` name, and name the saves that did not end."""
    findings = []
    for which in POINTERS:
        name = pointer_path(run_folder, which).name
        try:
            pointer = read_pointer(run_folder, which)
        except CheckpointError as error:
            findings.append(Finding("wrong", name, f"{error.got} {error.fix}"))
            continue
        if pointer is not None:
            metric = f", {pointer.metric} {pointer.value}" if pointer.metric else ""
            findings.append(Finding("ok", name, f"{pointer.checkpoint}{metric}."))
    said = "A save that is under way or was killed; the next save ends or removes it."
    return findings + [Finding("note", path.name, said) for path in sorted(run_folder.glob(f"{UNFINISHED}*"))]


def _manifest(folder: Path, reasons: list[str], names: set[str]) -> Iterator[Finding]:
    if not has_manifest(folder):
        yield Finding("note", MANIFEST, "There is none: sizes and SHA-256 cannot be compared.")
        return
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        manifest = None
    yield from (Finding("wrong", folder.name, reason) for reason in reasons)
    if manifest is None:
        return
    if not reasons:
        count = f"{len(manifest.files)} files, {size_text(manifest.total_bytes)}"
        yield Finding("ok", MANIFEST, f"{count}, every size and SHA-256 agrees; {_about(manifest)}.")
    for name in sorted(names - manifest.files.keys() - {MANIFEST}):
        if not any(reason.startswith(f"{shown(name)} ") for reason in reasons):
            yield Finding("note", name, "It came later, and no loader takes it.")


def _about(manifest: Manifest) -> str:
    said = {**manifest.about, **manifest.libraries}
    plain = [f"{key} {value}" for key, value in said.items() if isinstance(value, str | int | float)]
    return shown(", ".join(plain))


def _tensors(folder: Path, names: list[str], load: bool) -> Iterator[Finding]:
    headers: dict[str, dict[str, Tensor]] = {}
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        try:
            tensors = headers[name] = read_header(folder / name)
            if load:
                load_all(folder / name)
        except BadHeader as error:
            yield Finding("wrong", name, f"It {error}.")
            continue
        empty = empty_adapter(tensors) if PurePosixPath(name).name.startswith("adapter_model") else ""
        if empty or not tensors:
            yield Finding("wrong", name, f"It {empty or 'holds no tensors'}.")
        else:
            yield Finding("ok", name, f"{shapes_text(tensors)}{'; all of them load' if load else ''}.")
    for name in names:
        if name.endswith(_INDEX):
            yield _index(folder, name, headers)


def _index(folder: Path, name: str, headers: dict[str, dict[str, Tensor]]) -> Finding:
    """Whether the shards that an index lists hold the tensors that it gives them."""
    try:
        shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
        parent = PurePosixPath(name).parent
        lost = [one for one, shard in shards.items() if one not in headers.get(str(parent / shard), ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Finding("wrong", name, "It is no list of tensors and their shards.")
    if lost:
        shard = shown(str(shards[lost[0]]))
        text = f"It lists {len(lost)} tensors that their shards lack: {shown(lost[0])} in {shard}, for one."
        return Finding("wrong", name, text)
    return Finding("ok", name, f"{len(shards)} tensors in {len(set(shards.values()))} shards.")


def _json(folder: Path, names: list[str]) -> Iterator[Finding]:
    for name in names:
        if PurePosixPath(name).name in _JSON:
            problem = json_problem(folder / name)
            yield Finding(
                "wrong" if problem else "ok", name, f"It {problem}." if problem else "It can be read."
            )
    for name in names:
        path = PurePosixPath(name)
        if (
            path.name == "adapter_model.safetensors"
            and str(path.with_name("adapter_config.json")) not in names
        ):
            text = "It is missing, and without it nothing says how the adapter is attached."
            yield Finding("wrong", str(path.with_name("adapter_config.json")), text)
