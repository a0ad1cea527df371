"""A trained model as a folder that plain transformers loads.

Each weight is read from the live model, which is left as it is: dequantised if need be, the adapter
added in float32, rounded once. Layers are produced and written one after another, so that beyond the
live model about one shard and one layer are in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

from pantheraml.checkpoint.publish import publish_folder
from pantheraml.errors import ConfigError, NotYetError, SaveError, did_you_mean
from pantheraml.export.adapter import save_adapter
from pantheraml.export.quantized import nf4_pieces
from pantheraml.export.shards import parse_size, write_shards
from pantheraml.export.skeleton import (
    build_skeleton,
    checkpoint_tensors,
    kept_in_float32,
    layer_of,
    quantize_skeleton,
    source_is_turned,
)
from pantheraml.export.weights import Weight, plain_model, plain_weights
from pantheraml.log import say, warn
from pantheraml.models.fp8 import METHOD
from pantheraml.models.sharding import is_sharded

_METHODS = {
    "lora": "lora",
    "merged_16bit": "merged_16bit",
    "merged_16": "merged_16bit",
    "16bit": "merged_16bit",
    "merged_4bit": "merged_4bit",
    "merged_4": "merged_4bit",
    "4bit": "merged_4bit",
    "merged_4bit_forced": "merged_4bit",
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Processor = PreTrainedTokenizerBase | ProcessorMixin


def save_merged(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Processor | None = None,
    save_method: str = "merged_16bit",
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Save ``model`` for use without PantheraML, and with ``merged_*`` without PEFT.

    Args:
        model: a transformers model, or a PEFT model around one, in any precision; not changed.
        folder: where to; an older save in it is replaced, other files stay.
        tokenizer: tokenizer or processor to save with it, chat template included.
        save_method: "lora" (the adapter alone), "merged_16bit" or "merged_4bit" (NF4, double quantised).
        max_shard_size: limit of one weight file.
        dtype: of the merged weights; by default float16 for a model in float16, else bfloat16.

    Returns:
        ``folder``.

    Raises:
        ConfigError: unknown ``save_method``, ``dtype`` or ``max_shard_size``.
        AdapterError: there is no adapter to save, or one that cannot be merged.
        SaveError: the disk is full or cannot be written, or a merged weight is not finite.
    """
    folder = Path(folder)
    method = parse_method(save_method)
    if method == "lora":
        return save_adapter(model, folder, tokenizer)
    return write_merged(Merged(model, method, dtype), folder, tokenizer, max_shard_size)


def write_merged(
    merged: Merged, folder: Path, tokenizer: Processor | None, max_shard_size: int | str
) -> Path:
    """Write the folder that ``merged`` describes, once, as ``save_merged`` says."""
    try:
        with publish_folder(folder, merged.size) as build:
            _write_configs(merged.plain, merged.skeleton, build)
            write_shards(build, merged.tensors, max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(build)
    finally:
        merged.gather_rest()
    if (folder / "adapter_config.json").exists():
        warn(
            f"{folder} also holds an adapter, which transformers loads instead of the merged model. "
            "Save them to two folders, or delete adapter_config.json there."
        )
    say(f"Saved the merged model ({'4-bit NF4' if merged.in_4bit else str(merged.dtype)[6:]}) to {folder}.")
    return folder


def gather_merged(model: nn.Module, save_method: str, dtype: str | torch.dtype | None = None) -> None:
    """What a rank does while rank 0 is in ``save_merged``, where ranks share out the weights."""
    method = parse_method(save_method)
    if method != "lora":
        Merged(model, method, dtype).gather_rest()


class Merged:
    """What a merged folder will hold.

    Attributes:
        plain: the transformers model.
        skeleton: what will be loaded.
        weights: those that it has, without tied copies.
        dtype: of its weights.
        in_4bit: names of those that are packed.
        tensors: checkpoint names and CPU tensors, one repeated block at a time, once.
        is_shared_out: ranks share out the weights, and all of them have to read each.

    Args:
        model: that is saved.
        method: "merged_16bit" or "merged_4bit".
        dtype: of the weights (a torch dtype or its name), or None for the one that fits the model.
    """

    def __init__(self, model: nn.Module, method: str, dtype: str | torch.dtype | None) -> None:
        dtype = _parse_dtype(dtype)
        self.plain = plain_model(model)
        _refuse_other_quantizations(self.plain)
        weights = list(plain_weights(model))
        self.dtype = dtype or sixteen_bit(weights)
        skeleton = build_skeleton(self.plain, self.dtype, tied=True)
        if not _still_tied(skeleton, weights):
            skeleton = build_skeleton(self.plain, self.dtype, tied=False)
        expected = skeleton.state_dict().keys() - skeleton.all_tied_weights_keys.keys()
        self.weights = [weight for weight in weights if weight.name in expected]
        is_packed = method == "merged_4bit"
        self.in_4bit = quantize_skeleton(skeleton, _skipped(self.plain)) if is_packed else set[str]()
        self.skeleton = skeleton
        self.is_shared_out = is_sharded(model)
        _check_complete(expected | self.in_4bit, self.weights)
        self.tensors = _file_tensors(self.weights, skeleton, self.dtype, self.in_4bit)

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return _bytes_needed(self.weights, self.dtype, self.in_4bit)

    def gather_rest(self) -> None:
        """Gather what is left of ``tensors`` for ranks that wait for this one, also after a disk or hub has failed."""
        for _ in self.tensors if self.is_shared_out else ():
            pass


def merged_tensors(
    model: nn.Module, dtype: str | torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain model's weights, adapters merged, one after another.

    Yields:
        Names as in the plain model's ``state_dict`` and CPU tensors in ``dtype`` (buffers in their own),
        which may share memory with the model where nothing had to be computed.
    """
    weights = list(plain_weights(model))
    dtype = _parse_dtype(dtype) or sixteen_bit(weights)
    for weight in weights:
        yield weight.name, _rounded(weight, dtype, ()).cpu()


def parse_method(save_method: str) -> str:
    """ "lora", "merged_16bit" or "merged_4bit" from any accepted spelling.

    Raises:
        ConfigError: the word is unknown; the message lists the known ones.
    """
    if save_method not in _METHODS:
        known = sorted(set(_METHODS.values()))
        raise ConfigError(
            got=f"save_method={save_method!r} is unknown.",
            need=f"It is one of {', '.join(map(repr, known))}.",
            fix=did_you_mean(str(save_method), known) or "Write save_method='merged_16bit'.",
        )
    return _METHODS[save_method]


def check_mergeable_model(model: nn.Module, save_method: str, max_shard_size: int | str = "5GB") -> None:
    """Raise now what ``save_merged`` would raise about its arguments and the kind of model."""
    parse_size(max_shard_size)
    if parse_method(save_method) != "lora":
        _refuse_other_quantizations(plain_model(model))
        list(plain_weights(model))


def _file_tensors(
    weights: list[Weight], skeleton: PreTrainedModel, dtype: torch.dtype, in_4bit: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint names and CPU tensors, one repeated block at a time."""
    exceptions = kept_in_float32(skeleton, dtype)
    order = sorted(weights, key=lambda weight: layer_of(weight.name))  # stable, blocks together
    for _, block in groupby(order, key=lambda weight: layer_of(weight.name)):
        tensors: dict[str, torch.Tensor] = {}
        for weight in block:
            value = _rounded(weight, dtype, exceptions)
            if weight.name in in_4bit:
                value = value.T if source_is_turned(skeleton, weight.name) else value
                tensors |= {key: piece.cpu() for key, piece in nf4_pieces(weight.name, value).items()}
            else:
                tensors[weight.name] = value.cpu()
        yield from checkpoint_tensors(skeleton, tensors).items()


def merged_value(weight: Weight) -> torch.Tensor:
    """The weight's values with what was trained, as ``Weight.values`` gives them.

    Raises:
        SaveError: it is not in memory.
    """
    if weight.tensor.is_meta:
        raise SaveError(
            got=f"{weight.name} is not in memory: it was offloaded to the disk.",
            need="Merging reads every weight of the live model.",
            fix="Load the model without offloading (more memory or load_in_4bit=True), or save 'lora'.",
        )
    return weight.values()


def _rounded(weight: Weight, dtype: torch.dtype, exceptions: tuple[str, ...]) -> torch.Tensor:
    """The weight's values in the dtype of the file."""
    value = merged_value(weight)
    if not (weight.is_parameter and value.is_floating_point()):
        return value
    keep = any(re.search(part.replace("*", ".*"), weight.name) for part in exceptions)
    rounded = value.to(torch.float32 if keep else dtype)
    if weight.adapters and not rounded.isfinite().all():
        overflow = value.isfinite().all()
        raise SaveError(
            got=f"{weight.name} has values that are not finite after merging.",
            need=f"They do not fit into {dtype}." if overflow else "The adapter holds NaN or infinity.",
            fix="Pass dtype='bfloat16'." if overflow else "Use an earlier checkpoint of the training.",
        )
    return rounded


def _still_tied(skeleton: PreTrainedModel, weights: list[Weight]) -> bool:
    """Whether every pair that the base model ties still has equal values."""
    by_name = {weight.name: weight for weight in weights}
    for target, source in skeleton.all_tied_weights_keys.items():
        one, other = by_name[target], by_name[source]
        same = one.tensor is other.tensor and not one.adapters and not other.adapters
        if not same and not torch.equal(one.values(), other.values()):
            return False
    return True


def _check_complete(expected: set[str], weights: list[Weight]) -> None:
    """Refuse to write a folder that transformers would fill up with random weights."""
    missing = sorted(expected - {weight.name for weight in weights})
    if missing:
        raise SaveError(
            got=f"The live model lacks {len(missing)} tensors of the plain one: {', '.join(missing[:3])}.",
            need="Every weight of the plain model is needed to save it in this form.",
            fix="Undo changes made to the model's layers, or use save_method='lora'.",
        )


def _refuse_other_quantizations(plain: PreTrainedModel) -> None:
    quantization = getattr(plain.config, "quantization_config", None)
    if quantization is None or getattr(plain, "hf_quantizer", None) is None:
        return
    method = str(getattr(quantization.quant_method, "value", quantization.quant_method))
    if method != METHOD and not method.startswith("bitsandbytes"):
        raise NotYetError(
            got=f"The model's weights are quantised with {method}.",
            need="Merging reads unquantised weights, bitsandbytes 4-bit and 8-bit ones, and FP8 of load_in_fp8.",
            fix="Use save_method='lora', which saves the adapter itself.",
        )


def _skipped(plain: PreTrainedModel) -> list[str] | None:
    """Layers that the live 4-bit model was told to leave unquantised."""
    quantization = getattr(plain.config, "quantization_config", None)
    return getattr(quantization, "llm_int8_skip_modules", None)


def sixteen_bit(weights: list[Weight]) -> torch.dtype:
    """float16 when most of the weights compute in it, else bfloat16."""
    counts: dict[torch.dtype, int] = {}
    for weight in weights:
        if weight.is_parameter:
            counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.shape.numel()
    return torch.float16 if max(counts, key=counts.__getitem__) == torch.float16 else torch.bfloat16


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(
            got=f"dtype={dtype!r} cannot be saved.",
            need=f"It is one of {', '.join(_DTYPES)}.",
            fix=did_you_mean(name, _DTYPES) or "Leave dtype out.",
        )
    return _DTYPES[name]


def _bytes_needed(weights: list[Weight], dtype: torch.dtype, in_4bit: set[str]) -> int:
    """About what the weight files will take: 4-bit weights with their scales are 0.52 bytes each."""
    return int(
        sum(weight.shape.numel() * (0.52 if weight.name in in_4bit else dtype.itemsize) for weight in weights)
    )


def _write_configs(plain: PreTrainedModel, skeleton: PreTrainedModel, build: Path) -> None:
    if plain.is_remote_code():
        custom_object_save(plain, build, config=skeleton.config)  # pyright: ignore[reportArgumentType]
    skeleton.config.save_pretrained(build)
    if plain.can_generate():
        try:
            plain.generation_config.save_pretrained(build)
        except ValueError as error:  # hours of training are not lost over a sampling flag
            warn(f"The generation settings contradict each other and were saved as they are. {error}")
            plain.generation_config.to_json_file(build / "generation_config.json")
