"""What links between GPUs and their host can carry on paper, and what share of it is expected to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pantheraml.devices.nvml import NVML, Wires, open_nvml

# GB/s of one NVLink in one direction, by compute capability; the makers' data sheets.
_NVLINK: dict[tuple[int, int], float] = {
    (6, 0): 20.0,
    (7, 0): 25.0,
    (8, 0): 25.0,
    (8, 6): 14.0,
    (9, 0): 25.0,
    (10, 0): 50.0,
    (10, 3): 50.0,
}
# GB/s of one PCIe lane in one direction, by generation.
_PCIE_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}


@dataclass(frozen=True)
class Link:
    """A way that bytes take.

    Attributes:
        kind: ``"host memory"``: from one GPU to another over PCIe twice, because the GPUs do not reach one another.
        paper: GB/s in one direction on paper; None where the driver does not tell.
    """

    kind: Literal["NVLink", "PCIe", "host memory"]
    paper: float | None

    @property
    def expected(self) -> float | None:
        """GB/s of large copies below which something is wrong with the link, or somebody else uses it."""
        share = {"NVLink": 0.5, "PCIe": 0.5, "host memory": 0.2}[self.kind]
        return None if self.paper is None else share * self.paper

    def describe(self) -> str:
        """Such as ``NVLink, 450 GB/s on paper``."""
        return self.kind if self.paper is None else f"{self.kind}, {self.paper:.0f} GB/s on paper"


def pcie_link(wires: Wires | None) -> Link:
    """From a GPU to its host."""
    lane = None if wires is None else _PCIE_LANE.get(wires.pcie_generation or 0)
    return Link("PCIe", None if lane is None or wires is None else (lane * (wires.pcie_width or 0)) or None)


def peer_link(
    first: Wires | None, second: Wires | None, capability: tuple[int, int], is_direct: bool
) -> Link:
    """Between two GPUs.

    Args:
        first: what the driver tells of one; None: nothing.
        second: of the other.
        capability: compute capability of both.
        is_direct: whether they reach one another's memory.
    """
    nvlinks = min(wires.nvlinks if wires else 0 for wires in (first, second))
    if is_direct and nvlinks:
        each = _NVLINK.get(capability)
        return Link("NVLink", None if each is None else each * nvlinks)
    papers = [pcie_link(wires).paper for wires in (first, second)]
    known = [paper for paper in papers if paper is not None]
    return Link("PCIe" if is_direct else "host memory", min(known) if len(known) == 2 else None)


def slowest(links: Sequence[Link]) -> Link | None:
    """The link that a ring over all of ``links`` waits for."""
    order = ("NVLink", "PCIe", "host memory")
    return max(links, key=lambda link: (order.index(link.kind), -(link.paper or 0.0)), default=None)


def read_wires(index: int, nvml: NVML | None = None) -> Wires | None:
    """What the driver tells of the links of a GPU, by its number in torch; None where it tells nothing."""
    import torch

    nvml = nvml or open_nvml()
    if nvml is None:
        return None
    return nvml.wires(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


def read_peer_link(first: int, second: int) -> Link:
    """The link between two GPUs, by their numbers in torch."""
    import torch

    capability = torch.cuda.get_device_capability(first)
    is_direct = torch.cuda.can_device_access_peer(first, second)
    return peer_link(read_wires(first), read_wires(second), capability, is_direct)
