"""The devices that a run names, and the ranks that several of them mean."""

from __future__ import annotations

from typing import cast


def device_names(devices: object) -> list[str]:
    """``[0, "cpu"]`` -> ``["cuda:0", "cpu"]``; a single device counts as a list of one."""
    if devices is None:
        return []
    listed = cast("list[object]", devices) if isinstance(devices, list) else [devices]
    return [
        "cuda:0" if one == "cuda" else f"cuda:{one}" if isinstance(one, int) else str(one) for one in listed
    ]


def num_ranks(devices: object) -> int | None:
    """Ranks that ``[0, 1, ..., n - 1]`` means, which take the visible GPUs from the first on; None for other lists."""
    names = device_names(devices)
    are_the_first = names == [f"cuda:{index}" for index in range(len(names))]
    return len(names) if len(names) > 1 and are_the_first else None


def visible_devices(names: list[str]) -> str | None:
    """The value of CUDA_VISIBLE_DEVICES that shows these GPUs alone; None where not each is a GPU of its own."""
    indices = [name.removeprefix("cuda:") for name in names if name.startswith("cuda:")]
    return ",".join(indices) if len(set(indices)) == len(names) else None
