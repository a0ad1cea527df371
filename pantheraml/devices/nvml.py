"""What NVIDIA's driver tells about GPUs, without CUDA: asking it creates no context and takes no memory.

NVML (``libnvidia-ml.so.1``) comes with the driver; its C interface is stable. GPUs are named by UUID here, because NVML
counts all GPUs of a machine, and CUDA the visible ones.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

NVML_LIBRARY = "libnvidia-ml.so.1"
GIB = 1024**3
_UUID_BYTES = 96
_NAME_BYTES = 96
_TEMPERATURE_OF_GPU = 0
# GiB that CUDA's context, NCCL's buffers and the driver itself may take beside what a process allocates.
_BESIDE = 3.0
_OK, _INSUFFICIENT_SIZE = 0, 7
_VERSION_BYTES = 96
# More than any GPU has.
_MOST_NVLINKS = 36


class Gpu(NamedTuple):
    """A GPU of this machine.

    Attributes:
        uuid: as ``nvidia-smi -L`` prints it (``GPU-...``).
        is_split: it is in MIG mode, so that processes see a slice of it at most.
    """

    uuid: str
    is_split: bool


@dataclass(frozen=True)
class GPUState:
    """A GPU at a moment; what the driver does not tell is None.

    Attributes:
        used: GiB taken by all processes.
        total: GiB.
        power: W.
        temperature: degrees Celsius.
        processes: GiB of each process, by its number as the driver counts them (in a container: another than ours).
        name: as ``nvidia-smi`` prints it; empty where the driver does not tell.
    """

    used: float
    total: float
    power: float | None
    temperature: int | None
    processes: dict[int, float | None]
    name: str = ""

    def used_by_others(self, pid: int, reserved: float) -> float:
        """GiB that other processes took; where the driver does not name ours, what is far more than we need, or 0.

        Args:
            pid: of this process.
            reserved: GiB that its allocator holds.
        """
        if pid in self.processes:
            return sum(used or 0.0 for other, used in self.processes.items() if other != pid)
        rest = self.used - reserved
        return rest if rest > _BESIDE else 0.0


class Driver(NamedTuple):
    """The driver of this machine.

    Attributes:
        version: as ``nvidia-smi`` prints it (``580.159.04``).
        cuda: (major, minor) of the newest CUDA that it runs.
    """

    version: str
    cuda: tuple[int, int]


class Wires(NamedTuple):
    """What a GPU is connected by; what the driver does not tell is None.

    Attributes:
        nvlinks: how many of its NVLinks are up.
        pcie_generation: the newest that GPU and host have in common.
        pcie_width: lanes in use.
    """

    nvlinks: int
    pcie_generation: int | None
    pcie_width: int | None


class _Memory(Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _Process(Structure):
    _fields_ = [
        ("pid", c_uint),
        ("used", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    ]


class NVML:
    """The library, opened and started.

    Args:
        name: file name of the library.

    Raises:
        OSError: it is not there, or the driver does not run.
    """

    def __init__(self, name: str = NVML_LIBRARY) -> None:
        self._library = ctypes.CDLL(name)
        start = getattr(self._library, "nvmlInit_v2", None)
        if start is None or start() != _OK:
            raise OSError(f"{name} did not start: the NVIDIA driver does not run")

    def gpus(self) -> list[Gpu]:
        """Those of the machine that this process may open, in the order of their PCI addresses."""
        count = c_uint()
        if self._library.nvmlDeviceGetCount_v2(byref(count)) != _OK:
            return []
        found = (self._gpu(index) for index in range(count.value))
        return [gpu for gpu in found if gpu is not None]

    def state(self, uuid: str) -> GPUState | None:
        """The GPU as it is now, or None where NVML does not know it."""
        device = c_void_p()
        if self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), byref(device)) != _OK:
            return None
        memory = _Memory()
        if self._library.nvmlDeviceGetMemoryInfo(device, byref(memory)) != _OK:
            return None
        power = self._number("nvmlDeviceGetPowerUsage", device)
        temperature = c_uint()
        known = self._library.nvmlDeviceGetTemperature(device, c_int(_TEMPERATURE_OF_GPU), byref(temperature))
        return GPUState(
            used=memory.used / GIB,
            total=memory.total / GIB,
            power=None if power is None else power / 1000,
            temperature=temperature.value if known == _OK else None,
            processes=self._processes(device),
            name=self._name(device),
        )

    def driver(self) -> Driver | None:
        """The driver's version and CUDA's, or None where it does not tell."""
        version, cuda = (c_char * _VERSION_BYTES)(), c_int()
        if self._library.nvmlSystemGetDriverVersion(version, c_uint(_VERSION_BYTES)) != _OK:
            return None
        if self._library.nvmlSystemGetCudaDriverVersion_v2(byref(cuda)) != _OK:
            return None
        return Driver(version.value.decode(), (cuda.value // 1000, cuda.value % 1000 // 10))

    def wires(self, uuid: str) -> Wires | None:
        """What the GPU is connected by, or None where NVML does not know it."""
        device = c_void_p()
        if self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), byref(device)) != _OK:
            return None
        up = c_uint()
        ask = self._library.nvmlDeviceGetNvLinkState
        return Wires(
            nvlinks=sum(
                ask(device, c_uint(link), byref(up)) == _OK and up.value == 1 for link in range(_MOST_NVLINKS)
            ),
            pcie_generation=self._number("nvmlDeviceGetMaxPcieLinkGeneration", device),
            pcie_width=self._number("nvmlDeviceGetCurrPcieLinkWidth", device),
        )

    def _gpu(self, index: int) -> Gpu | None:
        device, name = c_void_p(), (c_char * _UUID_BYTES)()
        if self._library.nvmlDeviceGetHandleByIndex_v2(c_uint(index), byref(device)) != _OK:
            return None  # a container or a cgroup keeps it from us, and from CUDA
        if self._library.nvmlDeviceGetUUID(device, name, c_uint(_UUID_BYTES)) != _OK:
            return None
        mode, pending = c_uint(), c_uint()
        answer = self._library.nvmlDeviceGetMigMode(device, byref(mode), byref(pending))
        return Gpu(name.value.decode(), is_split=answer == _OK and mode.value == 1)

    def _number(self, function: str, device: c_void_p) -> int | None:
        value = c_uint()
        return value.value if getattr(self._library, function)(device, byref(value)) == _OK else None

    def _name(self, device: c_void_p) -> str:
        name = (c_char * _NAME_BYTES)()
        known = self._library.nvmlDeviceGetName(device, name, c_uint(_NAME_BYTES))
        return name.value.decode() if known == _OK else ""

    def _processes(self, device: c_void_p) -> dict[int, float | None]:
        count = c_uint(0)
        ask = self._library.nvmlDeviceGetComputeRunningProcesses_v3
        if ask(device, byref(count), POINTER(_Process)()) not in (_OK, _INSUFFICIENT_SIZE) or not count.value:
            return {}
        count = c_uint(count.value + 8)  # some may start in between
        found = (_Process * count.value)()
        if ask(device, byref(count), found) != _OK:
            return {}
        unknown = 2**64 - 1  # where the driver does not say, as in some containers
        return {one.pid: None if one.used == unknown else one.used / GIB for one in found[: count.value]}


@lru_cache(maxsize=1)
def open_nvml() -> NVML | None:
    """NVML, or None on a machine without a running NVIDIA driver."""
    try:
        return NVML()
    except OSError:
        return None
