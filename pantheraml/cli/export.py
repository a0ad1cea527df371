"""A saved model or adapter in another form: merged, in 4 bits, or as GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError
from pantheraml.export.gguf.formats import parse_formats
from pantheraml.models.source import read_json, resolve_source

_MERGED = ("merged_16bit", "merged_4bit")


def export_model(name: str, folder: Path, forms: Sequence[str], *, load_in_4bit: bool = False) -> None:
    """Load a model on the CPU in the dtype of its files, merge its adapter, and save it.

    Args:
        name: a folder or hub id of a model or of a saved adapter.
        folder: where to.
        forms: "merged_16bit", "merged_4bit", or formats of GGUF files.
        load_in_4bit: merge into the base model as 4-bit training saw it.

    Raises:
        PantheraMLError: what loading and saving raise; forms are looked at first.
    """
    merged = [form for form in forms if form in _MERGED]
    gguf = [form for form in forms if form not in _MERGED]
    if len(merged) > 1:
        raise ConfigError(
            got=f"Both {' and '.join(merged)} were asked for.",
            need="A folder holds one of them.",
            fix="Type the command once for each, with folders of their own.",
        )
    if gguf:
        parse_formats(gguf, torch.bfloat16)
    config = read_json(resolve_source(name).folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    model, tokenizer = FastLanguageModel.from_pretrained(
        name,
        max_seq_length=1,  # no rows are trained, so none is longer than what the model was made for
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        device_map="cpu",
        kernels="off",
        use_multi_gpu=False,
    )
    for form in merged:
        model.save_pretrained_merged(folder, tokenizer, save_method=form)
    if gguf:
        model.save_pretrained_gguf(folder, tokenizer, gguf)
