"""How numbers are stored in a GGUF file: the formats that can be written here, and tensors turned into them.

The blocks are those of the ``gguf`` library. K-quants and IQ-quants, which choose scales by a search, exist in
llama.cpp alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pantheraml.errors import ConfigError, ModelLoadError, NotYetError, did_you_mean

# Name of a format -> its name in gguf's ``LlamaFileType``.
_FILE_TYPES = {
    "f32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
_SYNONYMS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "fast_quantized": "q8_0", "8bit": "q8_0"}
_SIXTEEN_BIT = ("not_quantized", "16bit")  # f16 or bf16, as the model is
_LLAMA_CPP_ALONE = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq", "tq", "quantized", "mxfp4")
_CHUNK = 1 << 20  # values that a thread quantises at a time; numpy takes some 40 bytes for each


@dataclass(frozen=True)
class Format:
    """One way to write a file.

    Attributes:
        name: "f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0".
    """

    name: str

    @property
    def file_name(self) -> str:
        """Of the file in its folder."""
        return f"model-{self.name.upper()}.gguf"

    @property
    def file_type(self) -> int:
        """The number that the file calls its format."""
        return int(load_gguf().LlamaFileType[_FILE_TYPES[self.name]])

    def kind_of(self, name: str, shape: Sequence[int]) -> Any:
        """The ``GGMLQuantizationType`` of one tensor.

        Vectors, norms and routers stay in float32, as llama.cpp needs them. Rows that are no whole number of blocks are
        float16. Of formats with fewer than 8 bits, embedding and head are Q8_0: all tokens pass through them.

        Args:
            name: of the tensor in the file.
            shape: as torch has it.
        """
        gguf = load_gguf()
        is_matrix = len(shape) > 1 and name.endswith(".weight")
        if not is_matrix or name.endswith("_norm.weight") or ".ffn_gate_inp." in name:
            return gguf.GGMLQuantizationType.F32
        kind = gguf.GGMLQuantizationType[self.name.upper()]
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            return gguf.GGMLQuantizationType.F16
        is_small = self.name[:2] in ("q4", "q5")
        if is_small and name in ("token_embd.weight", "output.weight"):
            return gguf.GGMLQuantizationType.Q8_0
        return kind


def load_gguf() -> Any:
    """The ``gguf`` library.

    Raises:
        ModelLoadError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelLoadError(
            got="The gguf library is not installed.",
            need="It knows the names, blocks and keys of GGUF files.",
            fix='Run pip install "pantheraml[gguf]".',
        ) from error
    return gguf


def parse_formats(methods: str | Iterable[str], sixteen_bit: torch.dtype) -> list[Format]:
    """The formats of ``quantization_method``, each once.

    Args:
        methods: one name or several.
        sixteen_bit: what "not_quantized" stands for.

    Raises:
        NotYetError: a format that only llama.cpp can write.
        ConfigError: an unknown one.
    """
    names = [methods] if isinstance(methods, str) else list(methods)
    if not names:
        raise ConfigError(
            got="quantization_method is an empty list.",
            need="It names the files to write.",
            fix="Write quantization_method='q8_0'.",
        )
    return list(dict.fromkeys(_parse_format(name, sixteen_bit) for name in names))


def _parse_format(method: str, sixteen_bit: torch.dtype) -> Format:
    name = str(method).lower()
    if name in _SIXTEEN_BIT:
        return Format("f16" if sixteen_bit == torch.float16 else "bf16")
    name = _SYNONYMS.get(name, name)
    if name in _FILE_TYPES:
        return Format(name)
    known = ", ".join(_FILE_TYPES)
    if name.startswith(_LLAMA_CPP_ALONE):
        theirs = "Q4_K_M" if name == "quantized" else name.upper()
        raise NotYetError(
            got=f"quantization_method={method!r} is a format that only llama.cpp itself can write.",
            need=f"PantheraML writes {known}, and llama.cpp makes its formats of one of these.",
            fix="Save with quantization_method='bf16', then type "
            f"`llama-quantize FOLDER/model-BF16.gguf FOLDER/model-{theirs}.gguf {theirs}`.",
        )
    raise ConfigError(
        got=f"quantization_method={method!r} is unknown.",
        need=f"It is one of {known}, or a list of them.",
        fix=did_you_mean(name, _FILE_TYPES) or "Write quantization_method='q8_0'.",
    )


def bytes_of(shape: Sequence[int], kind: Any) -> int:
    """What a tensor of ``shape`` takes as ``kind``."""
    block, size = load_gguf().GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encode(value: torch.Tensor, kind: Any) -> np.ndarray[Any, Any]:
    """The bytes of ``value`` as ``kind``; beyond them a few chunks of it are held in float32.

    Args:
        value: any floating-point tensor on any device; its last dim is a whole number of blocks.
        kind: a ``GGMLQuantizationType``.
    """
    kinds = load_gguf().GGMLQuantizationType
    plain = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
    if kind in plain:
        stored = value.to(plain[kind]).contiguous().cpu()
        return stored.flatten().view(torch.uint8).numpy()
    rows = value.reshape(-1, value.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    stored = np.empty(bytes_of(rows.shape, kind), np.uint8).reshape(len(rows), -1)

    def quantise(start: int) -> None:
        from gguf import quants

        part = rows[start : start + step].float().cpu().numpy()
        stored[start : start + step] = quants.quantize(part, kind)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(quantise, range(0, len(rows), step)))
    return stored.reshape(-1)
