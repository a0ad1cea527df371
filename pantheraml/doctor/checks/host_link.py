"""How fast, and whether right, bytes go between host memory and each GPU."""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.doctor.check import Check
from pantheraml.doctor.copies import Copy, arrives, copy_now, gigabytes_per_second, random_bytes
from pantheraml.doctor.finding import Finding
from pantheraml.doctor.links import Link, pcie_link, read_wires

NAME = "host link"
_COMPARED, _TIMED = 32 * 2**20, 256 * 2**20


@dataclass(frozen=True)
class HostLink:
    """One GPU.

    Attributes:
        gpu: its number.
        is_right: what was copied there and back was the same.
        up: GB/s to the GPU, from pinned memory.
        down: GB/s to the host.
        link: that it has.
    """

    gpu: int
    is_right: bool
    up: float
    down: float
    link: Link


def probe(gpus: int) -> tuple[HostLink, ...]:
    """Copy to each GPU and back."""
    return tuple(measure(f"cuda:{index}", pcie_link(read_wires(index)), index) for index in range(gpus))


def measure(name: str, link: Link, gpu: int, *, size: int = _TIMED, copy: Copy = copy_now) -> HostLink:
    """One GPU.

    Args:
        name: of torch's device.
        link: that it has.
        gpu: its number.
        size: bytes of a copy that is timed.
        copy: how bytes are copied.
    """
    import torch

    device, host = torch.device(name), torch.device("cpu")
    data = random_bytes(min(size, _COMPARED), seed=gpu)
    is_right = arrives(data, host, device, copy) and arrives(data, device, host, copy)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    up, down = gigabytes_per_second(pinned, there, copy), gigabytes_per_second(there, pinned, copy)
    return HostLink(gpu, is_right, up, down, link)


def judge(facts: tuple[HostLink, ...]) -> list[Finding]:
    """A row for each GPU whose link is wrong or slow, or one for all."""
    found: list[Finding] = []
    for one in facts:
        seen = f"GPU {one.gpu}: {one.up:.1f} GB/s there, {one.down:.1f} back ({one.link.describe()})"
        expected = one.link.expected
        if not one.is_right:
            fix = f"Do not train on GPU {one.gpu}: type nvidia-smi -i {one.gpu} -q -d ECC, and dmesg | grep -i xid."
            found.append(Finding(NAME, "bad", f"GPU {one.gpu}: what was copied there and back differs", fix))
        elif expected is not None and min(one.up, one.down) < expected:
            fix = f"Type nvidia-smi -i {one.gpu} -q -d PCI while it works: lanes or generation may be below the most."
            found.append(Finding(NAME, "note", f"{seen}, expected {expected:.0f}", fix))
    if found:
        return found
    up, down = (sorted(getattr(one, name) for one in facts) for name in ("up", "down"))
    seen = f"{up[0]:.1f} GB/s there, {down[0]:.1f} back at least ({facts[0].link.describe()})"
    return [Finding(NAME, "ok", seen)]


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails="Type nvidia-smi, and dmesg | grep -i -e nvrm -e xid.",
    seconds=120,
    counts=True,
    least_gpus=1,
)
