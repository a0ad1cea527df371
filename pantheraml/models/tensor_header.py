"""The header of a safetensors file: which tensors it promises, compared with its size, by hand and without torch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

_MOST_HEADER = 100_000_000  # the format's own limit
# Types of less than a byte are left out: their sizes are not compared.
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class Tensor:
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]
    size: int


class BadHeader(ValueError):
    """A file that is no whole safetensors file; the text is the rest of a sentence that begins with its name."""


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after their places were compared with its size.

    Raises:
        BadHeader: the file is damaged, cut short, foreign or unreadable.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadHeader("is no plain file")
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= min(size - 8, _MOST_HEADER) else b""
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise BadHeader(f"cannot be read ({reason})") from None
    try:
        header = json.loads(text)
        tensors = {name: _tensor(entry) for name, entry in header.items() if name != "__metadata__"}
        places = sorted(tuple(header[name]["data_offsets"]) for name in tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadHeader(f"({size:,} bytes) has no readable safetensors header") from None
    end = 0
    for start, stop in places:
        if start != end:
            raise BadHeader("has a header whose tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        raise BadHeader(f"has {size:,} bytes where its header promises {8 + length + end:,} bytes")
    for name, tensor in tensors.items():
        width = _BYTES.get(tensor.dtype)
        if width is not None and tensor.size != width * math.prod(tensor.shape):
            raise BadHeader(f"has a header that gives {name!a} a size that is not that of its shape")
    return tensors


def _tensor(entry: dict) -> Tensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)) or stop < start:
        raise ValueError
    return Tensor(str(entry["dtype"]), shape, stop - start)
