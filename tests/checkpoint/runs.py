"""Small runs with real checkpoints, and processes that are killed at a chosen moment."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save as safetensors_bytes

from pantheraml.checkpoint.unfinished import publish, saving


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(value: float, size: int = 8) -> dict[str, bytes]:
    """The files of a small adapter's checkpoint; ``value`` tells one save from another."""
    tensors = {f"layer.lora_{part}.weight": np.full((size, size), value, np.float32) for part in "AB"}
    return {
        "adapter_model.safetensors": safetensors_bytes(tensors),
        "adapter_config.json": b'{"r": 8}',
        "trainer_state.json": json.dumps({"value": value}).encode(),
        "rank_1/rng_state.pth": str(value).encode() * 20,
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def save(run: Path, step: int, value: float | None = None) -> Path:
    """A whole checkpoint of ``step``; returns its folder."""
    with saving(run, step) as unfinished:
        write(unfinished.folder, contents(step if value is None else value))
        publish(unfinished, {"epoch": step / 10, "cursor": {"samples": step * 4}, "ranks": 2})
    return run / f"checkpoint-{step}"


def value_of(checkpoint: Path) -> float:
    """The value that a whole checkpoint was made with."""
    value = json.loads((checkpoint / "trainer_state.json").read_text())["value"]
    found = tree(checkpoint)
    assert "manifest.json" in found
    assert {name: data for name, data in found.items() if name != "manifest.json"} == contents(value)
    return value


def hidden(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name.startswith("."))


def in_a_process(action: Callable[[], object]) -> int:
    """Run ``action`` in a forked child; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(moment: int, root: Path) -> None:
    """Kill this process just before its ``moment``-th change of a file or folder below ``root``."""
    count, flush, place = [0], os.fsync, str(root)

    def step() -> None:
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        opened = event == "open" and str(arguments[0]).startswith(place)
        if opened or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            step()

    def fsync(handle: int) -> None:
        step()
        flush(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def kill_beyond(size: int) -> None:
    """Let the system kill this process where a file grows beyond ``size`` bytes, with those written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
