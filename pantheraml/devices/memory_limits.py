"""``max_memory``: how many bytes of each GPU a model may take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from pantheraml.errors import ConfigError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", re.IGNORECASE)
_GPU = re.compile(r"(?:cuda:)?(\d+)")
_EXAMPLE = 'Write max_memory={0: "10GiB", 1: "10GiB"}, for example, or leave it out for all that is free.'


def read_limits(max_memory: object, free: Mapping[int, int]) -> dict[int, int]:
    """Bytes that may be taken of each GPU that is to be used, in the order of their indices.

    Args:
        max_memory: None for all of ``free``, or a mapping from GPUs (``0``, ``"0"``, ``"cuda:0"``) to sizes (bytes, or
            ``"10GB"``, ``"10GiB"``, ``"500MB"``). GPUs it does not name are not used. ``"cpu"`` may be named, and gets
            nothing: weights that train stay on GPUs.
        free: bytes that are free of each visible GPU.

    Returns:
        For each GPU what is free of it or what was given, whichever is less.

    Raises:
        ConfigError: a GPU that is not there, or what is no GPU or no size.
    """
    if max_memory is None:
        return dict(sorted(free.items()))
    if not isinstance(max_memory, Mapping):
        raise ConfigError(
            got=f"max_memory={max_memory!r} was given.",
            need="It says for each GPU how much of it may be taken.",
            fix=_EXAMPLE,
        )
    given = cast("Mapping[object, object]", max_memory)
    limits: dict[int, int] = {}
    for name, size in given.items():
        index, limit = _index(name, free), _size(name, size)
        if index is None:
            continue
        if limit == 0:
            raise ConfigError(
                got=f"max_memory gives GPU {index} nothing ({size!r}).",
                need="GPUs that max_memory does not name are not used.",
                fix=f"Leave GPU {index} out of it.",
            )
        if index in limits:
            raise ConfigError(
                got=f"max_memory names GPU {index} twice.",
                need="Each GPU has one limit.",
                fix=f"Keep one of them, as {index}.",
            )
        limits[index] = min(limit, free[index])
    if not limits:
        raise ConfigError(
            got=f"max_memory={dict(given)!r} names no GPU.",
            need="GPUs it does not name are not used, and weights that are trained are not kept in host memory.",
            fix=_EXAMPLE,
        )
    return dict(sorted(limits.items()))


def _index(name: object, free: Mapping[int, int]) -> int | None:
    """The GPU that a key means; None for the host."""
    if name == "cpu":
        return None
    found = _GPU.fullmatch(str(name)) if isinstance(name, int | str) and not isinstance(name, bool) else None
    if found is None:
        raise ConfigError(
            got=f"max_memory has {name!r} as the name of a GPU.",
            need="GPUs are named 0, '0' or 'cuda:0', as this process counts them.",
            fix=_EXAMPLE,
        )
    index = int(found[1])
    if index not in free:
        seen = f"It sees {', '.join(map(str, sorted(free)))}; the first in CUDA_VISIBLE_DEVICES is 0."
        raise ConfigError(
            got=f"max_memory names GPU {index}, which this process does not see.",
            need=seen if free else "It sees no GPU.",
            fix=f"Leave GPU {index} out of it, or make it visible." if free else "Leave max_memory out.",
        )
    return index


def _size(name: object, size: object) -> int:
    """Bytes of a value."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise ConfigError(
            got=f"max_memory[{name!r}] is {size!r}.",
            need="A size is a number of bytes, or a text such as '10GB' (10 * 10**9), '10GiB' (10 * 2**30) or '500MB'.",
            fix=_EXAMPLE,
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])
