"""Whether driver, CUDA and the build of torch belong together."""

from __future__ import annotations

import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path

from pantheraml.devices.nvml import Driver, open_nvml
from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import NO_GPU, Finding

NAME = "driver and torch"
# The first driver that runs a CUDA of this major version; NVIDIA's table of compatibility.
_LEAST_DRIVER = {11: "450", 12: "525", 13: "580"}
# The build of torch for a driver's CUDA: any driver runs all minor versions of its major one.
_BUILDS = {12: "cu126", 13: "cu130"}


@dataclass(frozen=True)
class Facts:
    """What is installed.

    Attributes:
        driver: None where none runs.
        gpus: that the driver tells of.
        torch: version with its build (``2.13.0+cpu``); None: torch is not there.
        cuda: that torch was built for (``13.0``); None: for none.
        hip: the same of AMD.
    """

    driver: Driver | None
    gpus: int
    torch: str | None
    cuda: str | None = None
    hip: str | None = None


def probe() -> Facts:
    """Read the driver's version, and torch's own file of versions, which is there even where torch does not load."""
    nvml = open_nvml()
    driver, gpus = (nvml.driver(), len(nvml.gpus())) if nvml is not None else (None, 0)
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return Facts(driver, gpus, None)
    version = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return Facts(driver, gpus, version["__version__"], version["cuda"], version.get("hip"))


def judge(facts: Facts) -> list[Finding]:
    """One row."""
    if facts.torch is None:
        return [Finding(NAME, "bad", "torch is not installed", "Type pip install 'torch>=2.10,<2.14'.")]
    if facts.hip is not None:
        return [Finding(NAME, "ok", f"torch {facts.torch}, for ROCm {facts.hip}")]
    if facts.driver is None or not facts.gpus:
        return [Finding(NAME, "skipped", f"{NO_GPU}; torch {facts.torch}")]
    version, (major, minor) = facts.driver
    seen = f"driver {version} (CUDA {major}.{minor}), torch {facts.torch} "
    install = _install(facts.torch.split("+")[0], major)
    if facts.cuda is None:
        return [Finding(NAME, "bad", seen + "is built for the CPU", f"Type {install}.")]
    needed = int(facts.cuda.split(".")[0])
    if needed > major:
        least = _LEAST_DRIVER.get(needed)
        update = "Update the driver" + (f" to {least} or newer" if least else "")
        return [
            Finding(NAME, "bad", seen + f"is built for CUDA {facts.cuda}", f"{update}, or type {install}.")
        ]
    return [Finding(NAME, "ok", seen + f"(CUDA {facts.cuda})")]


def _install(version: str, major: int) -> str:
    """The command for a torch that a driver of CUDA ``major`` runs."""
    build = _BUILDS.get(major, _BUILDS[max(_BUILDS)] if major > max(_BUILDS) else _BUILDS[min(_BUILDS)])
    index = f"--index-url https://download.pytorch.org/whl/{build}"
    return f"pip install --force-reinstall torch=={version} {index}"


CHECK = Check(NAME, probe, judge, if_it_fails="Type pip install --force-reinstall torch.")
