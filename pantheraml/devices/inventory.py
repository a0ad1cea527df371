"""Which devices there are, and which one a run gets.

Nothing here changes the process: no environment variable is written and no device is selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from pantheraml.errors import ConfigError, HardwareError, did_you_mean

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
# Names that mean "place the model for me"; with one device they all mean that device.
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")

_FORMS = (
    "Write device_map=None (the GPU if there is one), 'cpu', 'cuda', 'cuda:1', 1 or {'': 0}; "
    f"{', '.join(repr(name) for name in AUTOMATIC)} work too."
)


def num_gpus() -> int:
    """Number of CUDA GPUs this process can see."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def is_bfloat16_supported(device: torch.device | None = None) -> bool:
    """Whether training may compute in bfloat16.

    Args:
        device: the device asked about; None is the current GPU, or the CPU without a GPU.

    Returns:
        True on NVIDIA GPUs from Ampere (compute capability 8.0) on and on AMD GPUs. True on a CPU too:
        there autocast has bfloat16, while float16 cannot be trained at all.
    """
    if num_gpus() == 0 or (device is not None and device.type != "cuda"):
        return True
    return (
        torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    )  # pragma: no cover - needs a GPU


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The floating-point type to load weights in.

    Args:
        dtype: a torch dtype, a name such as ``"bf16"``, or None to choose by device.
        device: where the weights will live.

    Returns:
        The dtype asked for; for None bfloat16 where the GPU has it, float16 on older GPUs, float32 on CPU.

    Raises:
        ConfigError: ``dtype`` is not one of ``DTYPES``.
    """
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if is_bfloat16_supported(device) else torch.float16
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
        name = str(dtype)
    else:
        name = str(dtype).lower().removeprefix("torch.")
        if name in DTYPES:
            return DTYPES[name]
    raise ConfigError(
        got=f"dtype={dtype!r} is not a type that models are loaded in.",
        need=f"It is None, a torch dtype, or one of {', '.join(repr(known) for known in DTYPES)}.",
        fix=did_you_mean(name, DTYPES) or "Leave dtype=None to let the device decide.",
    )


def gpu_device(index: int) -> torch.device:
    """The GPU ``index`` as this process counts them (0 is the first visible one).

    Raises:
        HardwareError: there is no such GPU.
    """
    count = num_gpus()
    if 0 <= index < count:
        return torch.device("cuda", index)  # pragma: no cover - needs a GPU
    if count == 0:
        raise HardwareError(
            got=f"GPU {index} was asked for, but this process sees no GPU.",
            need="To be seen, a GPU needs its driver, a torch built for it, and a place in CUDA_VISIBLE_DEVICES.",
            fix="To run on the CPU, leave the GPU out, or write device_map='cpu' where the model is loaded.",
        )
    there = ", ".join(
        f"{i} ({torch.cuda.get_device_name(i)})" for i in range(count)
    )  # pragma: no cover - needs a GPU
    raise HardwareError(  # pragma: no cover - needs a GPU
        got=f"GPU {index} was asked for, but it is not there.",
        need=f"The GPUs this process sees are {there}.",
        fix=f"Use an index from 0 to {count - 1}.",
    )


def resolve_device(device_map: object = None) -> torch.device:
    """The one device that ``device_map`` means.

    Args:
        device_map: None or an automatic name, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an index, a
            ``torch.device``, or a mapping from module names to these, such as ``{"": 0}``.

    Returns:
        The device; for an automatic name or None the current GPU, or the CPU without a GPU.

    Raises:
        ConfigError: ``device_map`` is none of these.
        HardwareError: the device is not there.
    """
    is_mapping = isinstance(device_map, Mapping)
    values = cast("Mapping[object, object]", device_map).values() if is_mapping else [device_map]
    named = {_name_device(value) for value in values}
    if len(named) > 1:
        raise ConfigError(
            got=f"device_map names {len(named)} devices: {', '.join(sorted(map(str, named)))}.",
            need="The model goes to one device here.",
            fix="Write device_map=None, or {'': 0} for the first GPU.",
        )
    if not named:
        raise ConfigError(got="device_map={} places nothing.", need="The model needs one device.", fix=_FORMS)
    device = named.pop()
    return device if device.type == "cpu" else gpu_device(device.index)


def _name_device(value: object) -> torch.device:
    """The device that one entry names, with an index if it is a GPU; it need not exist."""
    gpu_there = num_gpus() > 0
    current = torch.device("cuda", torch.cuda.current_device() if gpu_there else 0)
    if value is None or (isinstance(value, str) and value in AUTOMATIC):
        return current if gpu_there else torch.device("cpu")
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cuda", value) if value >= 0 else gpu_device(value)
    if isinstance(value, str | torch.device):
        kind, _, index = str(value).partition(":")
        if kind == "cpu":
            return torch.device("cpu")
        if kind == "cuda" and not index:
            return current
        if kind == "cuda" and index.isdecimal():
            return torch.device("cuda", int(index))
    raise ConfigError(
        got=f"device_map={value!r} is not a device of this library.",
        need="Models run on CUDA GPUs and on the CPU.",
        fix=" ".join(
            part for part in (did_you_mean(str(value), ("cpu", "cuda", *AUTOMATIC)), _FORMS) if part
        ),
    )
