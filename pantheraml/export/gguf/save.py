"""A trained model as one GGUF file, or several in different formats.

The file's list of tensors is written before any value is: shapes are known. Then each weight is read from the live
model, the adapter added, written to every file, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pantheraml.checkpoint.publish import publish_folder
from pantheraml.errors import SaveError
from pantheraml.export.gguf.families import find_gguf_family
from pantheraml.export.gguf.formats import Format, bytes_of, encode, load_gguf, parse_formats
from pantheraml.export.gguf.metadata import Keys, read_config, read_rope
from pantheraml.export.gguf.tensors import Piece, plan_tensors
from pantheraml.export.gguf.vocabulary import read_vocabulary
from pantheraml.export.merge import Merged, Processor, merged_value, sixteen_bit
from pantheraml.export.weights import Weight
from pantheraml.log import say


def save_gguf(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Processor | None,
    quantization_method: str | Iterable[str] = "q8_0",
) -> list[Path]:
    """Write ``model`` with its adapter merged to ``folder/model-Q8_0.gguf``, for llama.cpp and what is built on it.

    Args:
        model: a transformers model, or a PEFT model around one, in any precision; not changed.
        folder: where to; a file of the same format in it is replaced, other files stay.
        tokenizer: its tokenizer or processor, chat template included.
        quantization_method: "f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0", or a list of them, one file
            each; "not_quantized" is f16 or bf16, as the model is, and "fast_quantized" q8_0.

    Returns:
        The files.

    Raises:
        ConfigError: unknown ``quantization_method``.
        NotYetError: a format, an architecture or a tokenizer that cannot be written; nothing was.
        AdapterError: an adapter that cannot be merged.
        SaveError: no tokenizer, the disk is full or cannot be written, or a merged weight is not finite.
    """
    return write_gguf(GgufContents(model, tokenizer, quantization_method), folder)


def write_gguf(contents: GgufContents, folder: str | Path) -> list[Path]:
    """Write files of ``contents``, once, as ``save_gguf`` says."""
    try:
        with publish_folder(folder, contents.size) as build:
            files = [_File(build, one, contents) for one in contents.formats]
            try:
                for pieces, value in contents.values:
                    for piece in pieces:
                        for file in files:
                            file.write(piece, piece.of(value))
            finally:
                for file in files:
                    file.close()
    finally:
        contents.gather_rest()
    written = [Path(folder) / one.file_name for one in contents.formats]
    say(f"Saved the merged model to {', '.join(map(str, written))}.")
    return written


class GgufContents:
    """What GGUF files of a model will hold; making it finds all that can be wrong with the request.

    Attributes:
        formats: of the files.
        architecture: llama.cpp's name of the model.
        keys: metadata and vocabulary.
        constants: tensors that are no weights.
        pieces: all tensors of weights, in their order.
        values: what weights become and their merged values, one after another, once.

    Args:
        model: that is saved.
        tokenizer: its tokenizer or processor.
        quantization_method: one name of a format or several.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Processor | None, quantization_method: str | Iterable[str]
    ) -> None:
        load_gguf()
        merged = Merged(model, "merged_16bit", torch.float32)
        config = merged.plain.config
        self.formats = parse_formats(quantization_method, sixteen_bit(merged.weights))
        family = find_gguf_family(config)
        self.architecture = family.architecture
        self._plan = plan_tensors(merged.weights, config, family)
        self.pieces = [piece for _, pieces in self._plan for piece in pieces]
        rows = next(piece.shape[0] for piece in self.pieces if piece.name == "token_embd.weight")
        rope, self.constants = read_rope(config)
        self.keys: Keys = {
            "name": Path(getattr(config, "_name_or_path", "")).name,
            **read_config(config, family, rows),
            **rope,
            **read_vocabulary(tokenizer, rows),
        }
        self.values = self._read()
        self._is_shared_out = merged.is_shared_out

    @property
    def size(self) -> int:
        """Bytes of the tensors of all files."""
        return sum(
            bytes_of(piece.shape, one.kind_of(piece.name, piece.shape))
            for one in self.formats
            for piece in self.pieces
        )

    def _read(self) -> Iterator[tuple[list[Piece], torch.Tensor]]:
        for weight, pieces in self._plan:
            yield pieces, _finite(weight, merged_value(weight))

    def gather_rest(self) -> None:
        """Gather what is left of ``values`` for ranks that wait for this one, also after a disk or hub has failed."""
        for _ in self.values if self._is_shared_out else ():
            pass


def gather_gguf(
    model: nn.Module, tokenizer: Processor | None, quantization_method: str | Iterable[str]
) -> None:
    """What a rank does while rank 0 is in ``save_gguf``, where ranks share out the weights."""
    GgufContents(model, tokenizer, quantization_method).gather_rest()


class _File:
    """A GGUF file that is being written; its list of tensors is there, their values come in its order."""

    def __init__(self, folder: Path, form: Format, contents: GgufContents) -> None:
        gguf = load_gguf()
        self._form = form
        self._writer = gguf.GGUFWriter(folder / form.file_name, contents.architecture)
        for key, value in {**contents.keys, "file_type": form.file_type}.items():
            add = getattr(self._writer, f"add_{key}")
            add(value)
        constants = [
            Piece(name, tuple(value.shape), lambda value: value) for name, value in contents.constants.items()
        ]
        for piece in (*constants, *contents.pieces):
            kind = form.kind_of(piece.name, piece.shape)
            self._writer.add_tensor_info(
                piece.name, piece.shape, np.dtype(np.float32), bytes_of(piece.shape, kind), raw_dtype=kind
            )
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        for piece in constants:
            self.write(piece, contents.constants[piece.name])

    def write(self, piece: Piece, value: torch.Tensor) -> None:
        kind = self._form.kind_of(piece.name, piece.shape)
        stored = encode(value, kind)
        if kind.name == "F16" and not np.isfinite(stored.view(np.float16)).all():
            raise SaveError(
                got=f"{piece.name} has values that do not fit into float16.",
                need="The file would hold infinity.",
                fix="Pass quantization_method='bf16'.",
            )
        self._writer.write_tensor_data(stored)

    def close(self) -> None:
        self._writer.close()


def _finite(weight: Weight, value: torch.Tensor) -> torch.Tensor:
    """``value``.

    Raises:
        SaveError: it has NaN or infinity.
    """
    if not value.isfinite().all():
        raise SaveError(
            got=f"{weight.name} has values that are not finite{' after merging' if weight.adapters else ''}.",
            need="A GGUF file of them would give no text.",
            fix="Use an earlier checkpoint of the training.",
        )
    return value
