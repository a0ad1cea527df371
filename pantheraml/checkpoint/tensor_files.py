"""What the header of a safetensors file says, and whether the file keeps it; read by hand, without torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pantheraml.checkpoint.folder_files import reason_of, shown
from pantheraml.errors import first_line

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
        raise BadHeader(f"cannot be read ({reason_of(error)})") from None
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
        raise BadHeader(f"has {size:,} bytes where its header promises {8 + length + end:,}")
    for name, tensor in tensors.items():
        width = _BYTES.get(tensor.dtype)
        if width is not None and tensor.size != width * math.prod(tensor.shape):
            raise BadHeader(f"has a header that gives {shown(name)} a size that is not that of its shape")
    return tensors


def _tensor(entry: dict) -> Tensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)) or stop < start:
        raise ValueError
    return Tensor(str(entry["dtype"]), shape, stop - start)


def shapes_text(tensors: dict[str, Tensor]) -> str:
    """Types and shapes in brief, the most frequent first: ``14 tensors: 7 F32 [8, 64], 7 F32 [64, 8]``."""
    kinds = Counter(
        f"{shown(tensor.dtype)} {list(tensor.shape)}" for tensor in tensors.values()
    ).most_common()
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds[:3])
    more = f" and {len(kinds) - 3} other shapes" if len(kinds) > 3 else ""
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}: {listed}{more}" if tensors else "no tensors"


def empty_adapter(tensors: dict[str, Tensor]) -> str:
    """Why an adapter's file holds nothing that was trained, as the rest of a sentence; empty if it does."""
    if not tensors:
        return "holds no tensors: nothing of the adapter was saved"
    if not any(tensor.size for tensor in tensors.values()):
        return f"holds {len(tensors)} tensors without a single value: nothing of the adapter was saved"
    for part in ("lora_A", "lora_B"):
        sizes = [tensor.size for name, tensor in tensors.items() if part in name]
        if sizes and not any(sizes):
            return f"holds {len(sizes)} {part} tensors without a single value: nothing of them was saved"
    return ""


def load_all(path: Path) -> None:
    """Load every tensor of a file, one after another.

    Raises:
        BadHeader: safetensors refuses the file or a tensor.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            get: Callable[[str], object] = file.get_tensor
            for name in file.keys():  # noqa: SIM118 - no mapping
                get(name)
    except Exception as error:
        raise BadHeader(f"cannot be loaded by safetensors ({first_line(error)})") from None
