"""Room in /dev/shm, by which ranks and the workers of data loaders exchange data."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pantheraml.devices.nvml import GIB
from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding
from pantheraml.errors import first_line

NAME = "shared memory"
_FOLDER = Path("/dev/shm")
# What several ranks and their workers take. Docker gives 64 MiB, with which NCCL does not start.
NEEDED = GIB


@dataclass(frozen=True)
class Facts:
    """What there is.

    Attributes:
        folder: where.
        gpus: on this machine.
        total: bytes; None: there is no such folder, as on systems that need none.
        free: bytes.
        failure: why nothing can be written there, as a clause, or None.
    """

    folder: Path
    gpus: int
    total: int | None = None
    free: int = 0
    failure: str | None = None


def probe(gpus: int, folder: Path = _FOLDER) -> Facts:
    """Ask for its size, and write a file."""
    if not folder.is_dir():
        return Facts(folder, gpus)
    size = shutil.disk_usage(folder)
    failure = None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        failure = first_line(error)
    return Facts(folder, gpus, size.total, size.free, failure)


def judge(facts: Facts) -> list[Finding]:
    """One row; too little room is red where several ranks would share it."""
    if facts.total is None:
        return [Finding(NAME, "skipped", f"this system has no {facts.folder}")]
    bigger = (
        "Remove old files from it, or make it bigger: docker run --shm-size=16g (or --ipc=host), "
        f"elsewhere mount -o remount,size=16G {facts.folder}."
    )
    if facts.failure is not None:
        return [Finding(NAME, "bad", f"{facts.folder} cannot be written: {facts.failure}", bigger)]
    seen = f"{facts.free / GIB:.2f} of {facts.total / GIB:.2f} GiB free in {facts.folder}"
    if facts.free >= NEEDED:
        return [Finding(NAME, "ok", seen)]
    seen += f", {NEEDED / GIB:g} GiB is needed by several ranks"
    return [Finding(NAME, "bad" if facts.gpus > 1 else "note", seen, bigger)]


CHECK = Check(NAME, probe, judge, if_it_fails=f"Type df -h {_FOLDER}.", counts=True)
