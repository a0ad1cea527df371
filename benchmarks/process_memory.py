"""Memory of whole processes, as the system counts it: on the host by shares, on GPUs by the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
ROLLUP = Path("/proc/self/smaps_rollup")


def host_share(file: Path = ROLLUP, kinds: Sequence[str] = ("Pss",)) -> float | None:
    """GiB of this process on the host, pages that N processes share counted as 1/N (PSS): shares add up.

    Args:
        file: the system's account of the process.
        kinds: lines of it to add up; ``Pss_Anon`` and ``Pss_Shmem`` are what no file on a disk holds.

    Returns:
        None where the system does not tell.
    """
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines]
    told = [int(line[1]) * 1024 / GIB for line in found if line[0].rstrip(":") in kinds]
    return sum(told) if told else None


def tree_shares(pid: int, kinds: Sequence[str] = ("Pss",)) -> list[float]:
    """The ``host_share`` of a process and of all that it has started, as far as they are still there."""
    import psutil

    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    shares = [host_share(Path(f"/proc/{process.pid}/smaps_rollup"), kinds) for process in processes]
    return [share for share in shares if share is not None]


class HostWatch:
    """The ``host_share`` of this process within a block, looked at ten times a second.

    Attributes:
        seen: GiB by the second of the clock that all processes of a host share (``time.time()``).
    """

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._over = threading.Event()

    def __enter__(self) -> HostWatch:
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._look()

    def _look(self) -> None:
        share = host_share()
        if share is not None:
            self.seen.append((time.time(), share))


def peak_together(watched: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """The most GiB that several processes held at one time; None where the system does not tell.

    Args:
        watched: what each of them saw (``HostWatch.seen``); before the first look and after the last one it is taken
            to have held as much as then.
    """
    if not watched or not all(watched):
        return None
    now = [seen[0][1] for seen in watched]
    peak = sum(now)
    for _, index, share in sorted(
        (at, index, share) for index, seen in enumerate(watched) for at, share in seen
    ):
        now[index] = share
        peak = max(peak, sum(now))
    return peak


def processes_by_gpu(uuids: Iterable[str], nvml: Any) -> dict[str, dict[int, float | None]]:
    """GiB of each process on each of the GPUs, as NVML counts them; empty without NVML.

    Args:
        uuids: of the GPUs, ``GPU-...``.
        nvml: ``pantheraml.devices.nvml.NVML``, or None.
    """
    states = {uuid: nvml.state(uuid) for uuid in uuids} if nvml is not None else {}
    return {uuid: state.processes for uuid, state in states.items() if state is not None}


def stays_at_home(by_gpu: dict[str, dict[int, float | None]]) -> bool | None:
    """Whether each process is on one GPU and each GPU has one process; None where the driver lists none."""
    pids = [pid for processes in by_gpu.values() for pid in processes]
    if not pids:
        return None
    return len(set(pids)) == len(pids) and all(len(processes) == 1 for processes in by_gpu.values())
