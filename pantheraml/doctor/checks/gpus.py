"""GPUs that the driver has, that CUDA_VISIBLE_DEVICES shows, and that torch computes on."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pantheraml.devices.nvml import Gpu
from pantheraml.devices.visible_gpus import select_visible
from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import NO_GPU, Finding
from pantheraml.launch.gpus import count_visible, read_gpus

NAME = "GPUs"
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"


@dataclass(frozen=True)
class Facts:
    """What there is.

    Attributes:
        driver: GPUs that the driver tells of; None where none runs.
        on_bus: GPUs of NVIDIA on the PCI bus.
        selection: CUDA_VISIBLE_DEVICES; None: unset.
        has_cuda: torch was built for GPUs.
        names: of the GPUs that torch counts.
        failures: what a sum on each of them raised, as a clause; None if it was right.
    """

    driver: tuple[Gpu, ...] | None
    on_bus: int
    selection: str | None
    has_cuda: bool
    names: tuple[str, ...] = ()
    failures: tuple[str | None, ...] = ()


def probe() -> Facts:
    """Ask the bus, the driver and torch, and add numbers up on every GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Facts(
        driver=read_gpus(),
        on_bus=num_on_bus(),
        selection=os.environ.get("CUDA_VISIBLE_DEVICES"),
        has_cuda=torch.version.cuda is not None or torch.version.hip is not None,
        names=tuple(torch.cuda.get_device_name(index) for index in range(count)),
        failures=tuple(_failure(index) for index in range(count)),
    )


def num_on_bus(folder: Path = _PCI) -> int:
    """GPUs of NVIDIA that the PCI bus has, with or without a driver; 0 where the system does not tell."""
    found = 0
    for device in folder.glob("*") if folder.is_dir() else ():
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        found += vendor == _NVIDIA and kind.startswith(_DISPLAY)
    return found


def _failure(index: int) -> str | None:
    import torch

    try:
        total = torch.arange(1000, device=torch.device("cuda", index)).sum().item()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return None if total == 499500 else f"0 + 1 + ... + 999 is {total} there"


def judge(facts: Facts) -> list[Finding]:
    """A row for each thing that is wrong, or one that counts."""
    if facts.driver is None and not facts.names:
        return [_without_driver(facts)]
    wrong = [*_wrong_selection(facts), *_wrong_count(facts), *_wrong_sums(facts)]
    if wrong:
        return wrong
    if not facts.names:
        seen = f"all {len(facts.driver or ())} are hidden by CUDA_VISIBLE_DEVICES={facts.selection!r}"
        return [Finding(NAME, "note", seen, "Type unset CUDA_VISIBLE_DEVICES to train on them.")]
    kinds = ", ".join(f"{count} x {name}" for name, count in Counter(facts.names).items())
    hidden = len(facts.driver or ()) - len(facts.names)
    also = f"; {hidden} more hidden by CUDA_VISIBLE_DEVICES={facts.selection}" if hidden > 0 else ""
    return [Finding(NAME, "ok", kinds + also)]


def _without_driver(facts: Facts) -> Finding:
    if facts.on_bus:
        return Finding(
            NAME,
            "bad",
            f"{facts.on_bus} of NVIDIA on the PCI bus, and no driver that answers",
            "Type nvidia-smi: it says what is wrong with the driver. In a container: docker run --gpus all.",
        )
    if listed(facts.selection):
        seen = f"CUDA_VISIBLE_DEVICES={facts.selection} names a GPU, and there is no NVIDIA driver"
        return Finding(NAME, "bad", seen, "Type unset CUDA_VISIBLE_DEVICES.")
    return Finding(NAME, "skipped", NO_GPU)


def listed(selection: str | None) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES that are to name a GPU.

    ``-1`` ends the list, and hides all when it is first; ``NoDevFiles`` is what SLURM writes in jobs without a GPU.
    """
    entries = [entry.strip() for entry in (selection or "").split(",")]
    ends = (place for place, entry in enumerate(entries) if entry in ("", "NoDevFiles") or entry[0] == "-")
    end = next(ends, None)
    return entries[:end]


def _wrong_selection(facts: Facts) -> list[Finding]:
    entries = listed(facts.selection)
    if facts.driver is None or not entries:
        return []
    visible = select_visible(facts.driver, facts.selection)
    if visible is None or len(visible) >= len(entries):
        return []
    twice = [entry for entry, count in Counter(entries).items() if count > 1]
    what = f"names {twice[0]} twice" if twice else f"names {entries[len(visible)]}, which is not there"
    there = ",".join(str(index) for index in range(len(facts.driver)))
    return [
        Finding(
            NAME,
            "bad",
            f"CUDA_VISIBLE_DEVICES={facts.selection} {what}: CUDA shows {len(visible)} of {len(facts.driver)}",
            f"Type export CUDA_VISIBLE_DEVICES={there}, or leave some of these out.",
        )
    ]


def _wrong_count(facts: Facts) -> list[Finding]:
    if facts.driver is None:
        return []
    visible = count_visible(facts.driver, facts.selection)
    if visible == len(facts.names):
        return []
    if not facts.has_cuda:
        fix = "Install a torch that is built for GPUs; the row 'driver and torch' says how."
    else:
        fix = "Type python -c 'import torch; torch.cuda.init()': it says why. Often the driver was updated: reboot."
    return [Finding(NAME, "bad", f"the driver shows {visible}, torch counts {len(facts.names)}", fix)]


def _wrong_sums(facts: Facts) -> list[Finding]:
    found: list[Finding] = []
    for index, (name, failure) in enumerate(zip(facts.names, facts.failures, strict=True)):
        if failure is None:
            continue
        if "no kernel image" in failure:
            fix = f"Install a torch that is built for {name}: https://pytorch.org/get-started/locally."
        else:
            fix = (
                f"Type nvidia-smi -i {index} -q -d ECC,PERFORMANCE; without GPU {index} the others may train."
            )
        found.append(Finding(NAME, "bad", f"GPU {index} ({name}): {failure}", fix))
    return found


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails="Type python -c 'import torch; print(torch.cuda.device_count())', which has to work first.",
)
