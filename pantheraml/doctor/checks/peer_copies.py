"""Copies between every two GPUs, both ways, compared by checksum.

Where the machine redirects such copies (ACS and an IOMMU switched on), they end without an error, and with other bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.doctor.check import Check
from pantheraml.doctor.copies import Copy, arrives, copy_now, gigabytes_per_second, random_bytes
from pantheraml.doctor.finding import Finding
from pantheraml.doctor.links import Link, read_peer_link

NAME = "copies between GPUs"
_COMPARED, _TIMED = 32 * 2**20, 256 * 2**20


@dataclass(frozen=True)
class PeerCopy:
    """One direction between two GPUs.

    Attributes:
        source: number of the GPU.
        target: number of the other.
        is_right: what arrived is what was sent.
        rate: GB/s.
        link: that they have.
    """

    source: int
    target: int
    is_right: bool
    rate: float
    link: Link


def probe(gpus: int) -> tuple[PeerCopy, ...]:
    """Copy from each GPU to each other."""
    pairs = [(first, second) for first in range(gpus) for second in range(gpus) if first != second]
    return tuple(
        measure(pair, read_peer_link(*pair), (f"cuda:{pair[0]}", f"cuda:{pair[1]}")) for pair in pairs
    )


def measure(
    pair: tuple[int, int],
    link: Link,
    devices: tuple[str, str],
    *,
    size: int = _TIMED,
    copy: Copy = copy_now,
) -> PeerCopy:
    """One direction.

    Args:
        pair: numbers of the GPUs, from and to.
        link: that they have.
        devices: torch's names of them.
        size: bytes of a copy that is timed.
        copy: how bytes are copied.
    """
    import torch

    source, target = map(torch.device, devices)
    data = random_bytes(min(size, _COMPARED), seed=1 + pair[0] * 1000 + pair[1])
    is_right = arrives(data, source, target, copy)
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for device in (source, target))
    return PeerCopy(*pair, is_right, gigabytes_per_second(here, there, copy), link)


def judge(facts: tuple[PeerCopy, ...]) -> list[Finding]:
    """A row for wrong copies, one for slow ones, or one for all."""
    found: list[Finding] = []
    wrong = [one for one in facts if not one.is_right]
    if wrong:
        found.append(
            Finding(
                NAME,
                "bad",
                f"other bytes arrive than were sent: {_name(wrong)}",
                "Type export NCCL_P2P_DISABLE=1 to train meanwhile; then switch ACS off in the BIOS, and the IOMMU "
                "(iommu=pt on the kernel's command line).",
            )
        )
    slow = [one for one in facts if one.link.expected is not None and one.rate < one.link.expected]
    if slow:
        worst = min(slow, key=lambda one: one.rate)
        seen = f"{worst.rate:.0f} GB/s ({worst.link.describe()}; expected {worst.link.expected:.0f}): {_name(slow)}"
        fix = "Type nvidia-smi topo -m for how they are linked, nvidia-smi nvlink -s for links that are down."
        found.append(Finding(NAME, "note", seen, fix))
    if found:
        return found
    rates = [one.rate for one in facts]
    kinds = " and ".join(sorted({one.link.describe() for one in facts}))
    seen = f"{len(facts)} ways, the same bytes on each, {min(rates):.0f} to {max(rates):.0f} GB/s ({kinds})"
    return [Finding(NAME, "ok", seen)]


def _name(copies: list[PeerCopy], most: int = 6) -> str:
    names = [f"{one.source} to {one.target}" for one in copies]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails="Type export NCCL_P2P_DISABLE=1 to train without such copies, and nvidia-smi topo -m to see the links.",
    seconds=180,
    counts=True,
    least_gpus=2,
)
