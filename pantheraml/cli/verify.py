"""Whether checkpoints and saved models are what was saved: a line for each checked thing, and a verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pantheraml.checkpoint.inspection import Inspection, inspect_checkpoint, inspect_pointers, is_run_folder
from pantheraml.checkpoint.manifest import has_manifest
from pantheraml.checkpoint.names import checkpoints
from pantheraml.checkpoint.resuming import choose
from pantheraml.errors import CheckpointError, first_line


def verify_folder(path: Path, *, load: bool = False, write: Callable[[str], None] = print) -> bool:
    """Check a checkpoint, a saved model or adapter, or all checkpoints of a run.

    Args:
        path: the folder.
        load: also load every tensor.
        write: takes each line.

    Returns:
        Whether nothing is wrong.

    Raises:
        CheckpointError: there is no such folder, or it cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"There is no folder '{path}'.",
            "A checkpoint, a saved model, or the output_dir of a run can be checked.",
            "Type `pantheraml verify outputs/checkpoint-7` or `pantheraml verify outputs`.",
        )
    folder = path.resolve()  # "." has no name
    try:
        if is_run_folder(folder):
            return _verify_run(folder, load, write)
    except OSError as error:
        raise CheckpointError(
            f"'{path}' cannot be read: {first_line(error)}.",
            "All of its files are read.",
            f"Type `ls -ld {path}` to see whose it is.",
        ) from error
    inspection = inspect_checkpoint(folder, load=load)
    _write_findings(inspection, write)
    if not inspection.num_wrong:
        compared = has_manifest(folder)
        write(
            f"{folder.name} is whole."
            if compared
            else f"Nothing is wrong with {folder.name} that can be seen."
        )
        return True
    write(
        f"{folder.name} is not what was saved: {_things(inspection.num_wrong)} wrong. Copy the named files again, or "
        f"use another one; `pantheraml verify {folder.parent}` looks at all beside it."
    )
    return False


def _verify_run(folder: Path, load: bool, write: Callable[[str], None]) -> bool:
    pointers = inspect_pointers(folder)
    inspections: dict[Path, Inspection] = {}
    for checkpoint in checkpoints(folder):
        write(f"{checkpoint.name}:")
        inspections[checkpoint] = inspect_checkpoint(checkpoint, load=load)
        _write_findings(inspections[checkpoint], write, indent="  ")
    for finding in pointers:
        write(str(finding))
    choice = choose(folder, lambda one: inspections[one].damage)
    resumed = f"A run resumes from {choice.folder.name}." if choice.folder else "A run would start anew."
    damaged = [one.name for one, inspection in inspections.items() if inspection.num_wrong]
    num_wrong = sum(finding.verdict == "wrong" for finding in pointers)
    if not damaged and not num_wrong:
        write(f"Nothing is wrong with the {len(inspections)} checkpoints. {resumed}")
        return True
    said = [f"Not whole: {', '.join(damaged)}; copy again or remove."] if damaged else []
    said += [f"The pointers: {_things(num_wrong)} wrong."] if num_wrong else []
    write(" ".join([*said, resumed]))
    return False


def _write_findings(inspection: Inspection, write: Callable[[str], None], indent: str = "") -> None:
    for finding in inspection.findings:
        write(f"{indent}{finding}")


def _things(count: int) -> str:
    return "one thing is" if count == 1 else f"{count} things are"
