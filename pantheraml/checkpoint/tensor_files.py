"""What is in safetensors files: told in brief, looked through for adapters without values, loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pantheraml.checkpoint.folder_files import shown
from pantheraml.errors import first_line
from pantheraml.models.tensor_header import BadHeader, Tensor


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
