"""The guides' ``DeviceManager``: which GPUs there are, and what is on them, now or over a while.

The driver is asked, so that a process that is to start ranks touches no GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from pantheraml.devices.nvml import GIB
from pantheraml.devices.visible_gpus import visible_memory, visible_states


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU where there is none; what is not told is None.

    Attributes:
        device: as torch names it: ``"cuda:0"``, ``"cpu"``.
        name: of its kind.
        total: GiB.
        used: GiB that all processes have taken.
        power: W.
        temperature: degrees Celsius.
    """

    device: str
    name: str
    total: float
    used: float
    power: float | None = None
    temperature: int | None = None

    @property
    def free(self) -> float:
        """GiB."""
        return self.total - self.used


@dataclass
class Watch:
    """What a time of watching has seen.

    Attributes:
        samples: the devices at each moment, in order.
    """

    samples: list[list[Device]] = field(default_factory=list[list[Device]])

    @property
    def peaks(self) -> dict[str, float]:
        """The most GiB that were taken of each device, by its name in torch."""
        found: dict[str, float] = {}
        for one in (device for devices in self.samples for device in devices):
            found[one.device] = max(one.used, found.get(one.device, 0.0))
        return found


class DeviceManager:
    """GPUs as this process sees them, in CUDA's order."""

    def get_available_devices(self) -> list[Device]:
        """The GPUs as they are now; without one, the CPU with the host's memory."""
        states = visible_states()
        if states is None:
            return _devices_of_torch()
        found = [
            Device(f"cuda:{index}", one.name, one.total, one.used, one.power, one.temperature)
            for index, one in enumerate(states)
        ]
        return found or [_host()]

    @contextmanager
    def watch(self, seconds: float = 1.0) -> Iterator[Watch]:
        """Look at the devices again and again while a block runs, from a thread.

        Args:
            seconds: between two looks; there is one at the beginning and one at the end.
        """
        seen, done = Watch([self.get_available_devices()]), threading.Event()

        def look() -> None:
            while not done.wait(seconds):
                seen.samples.append(self.get_available_devices())

        thread = threading.Thread(target=look, name="pantheraml-devices", daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()
            seen.samples.append(self.get_available_devices())


def _host() -> Device:
    memory = psutil.virtual_memory()
    return Device("cpu", "CPU", memory.total / GIB, (memory.total - memory.available) / GIB)


def _devices_of_torch() -> list[Device]:
    """Where NVML cannot tell: AMD's GPUs, slices of GPUs, no GPU."""
    free, total = visible_memory("free"), visible_memory("total")
    if not total:
        return [_host()]
    import torch

    return [
        Device(f"cuda:{index}", torch.cuda.get_device_name(index), size / GIB, (size - free[index]) / GIB)
        for index, size in total.items()
    ]
