"""Adapters: saved with a record of their base model, and checked against it before they are loaded."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.pytorch_utils import Conv1D

from pantheraml.checkpoint.names import UNFINISHED
from pantheraml.checkpoint.publish import publish_folder
from pantheraml.errors import AdapterError
from pantheraml.export.fingerprint import base_name, differences, fingerprint
from pantheraml.export.quantized import is_4bit, is_8bit
from pantheraml.export.weights import plain_model, without_adapters
from pantheraml.log import say
from pantheraml.models.source import read_json
from pantheraml.models.state import get_state
from pantheraml.version import __version__

RECORD = "pantheraml.json"
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "safetensors")
_KEY = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight|\.bias)?"
)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    **kwargs: Any,
) -> Path:
    """Save the adapter of ``model`` as safetensors, with a record of the base model it belongs to.

    Args:
        model: a PEFT model.
        folder: where to; an older adapter in it is replaced, other files stay.
        tokenizer: tokenizer or processor to save with it.
        **kwargs: for PEFT's ``save_pretrained`` (``selected_adapters``, ``state_dict``, …).

    Returns:
        ``folder``.

    Raises:
        AdapterError: ``model`` has no adapter.
        SaveError: the disk is full or cannot be written; an older save is untouched.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(
            got=f"This {type(model).__name__} has no adapter.",
            need="save_method='lora' saves what an adapter learned.",
            fix="Use save_method='merged_16bit' for a fully fine-tuned model, or add an adapter with "
            "FastLanguageModel.get_peft_model.",
        )
    kwargs.setdefault("save_embedding_layers", vocabulary_changed(model))
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    with publish_folder(folder, trained) as build:
        type(model).save_pretrained(model, str(build), **kwargs)
        record = {"versions": _versions(), "base_model": fingerprint(model)}
        for config in build.rglob("adapter_config.json"):  # named adapters lie in folders of their own
            config.with_name(RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(build)
    if not Path(folder).parent.name.startswith(
        UNFINISHED
    ):  # else a checkpoint, which is there when it is whole
        say(f"Saved the adapter to {folder}.")
    return Path(folder)


def vocabulary_changed(model: PeftModel) -> bool | Literal["auto"]:
    """Whether the embedding has other rows than the checkpoint's; PEFT would ask the hub, so it is told."""
    state = get_state(model)
    if state is None:
        return "auto"
    config = read_json(state.source.folder / "config.json")
    stored = config.get("text_config", config).get("vocab_size")
    return stored is not None and stored != plain_model(model).config.get_text_config().vocab_size


def check_adapter_matches(adapter_folder: str | Path, base_model: nn.Module) -> None:
    """Refuse an adapter that was trained on another base model than ``base_model``.

    An adapter that PantheraML did not save has no record; then only its layers and shapes are compared.

    Args:
        adapter_folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_model: the model it is to be put on, in any precision.

    Raises:
        AdapterError: no adapter there, another base model, or layers and shapes that do not fit.
    """
    folder = Path(adapter_folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise AdapterError(
                got=f"{folder} has no {name}.",
                need="An adapter folder holds adapter_config.json and adapter_model.safetensors.",
                fix="Give the folder that save_pretrained wrote the adapter to.",
            )
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    trained_on = config.get("base_model_name_or_path")
    found: list[str] = []
    if (folder / RECORD).is_file():
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))["base_model"]
        trained_on = recorded["name"]
        found = differences(recorded, fingerprint(base_model))
    found = found or _misfits(folder / "adapter_model.safetensors", base_model)
    if found:
        here = base_name(base_model)
        known = trained_on and trained_on != here  # a folder may have been overwritten with another model
        more = f"; and {len(found) - 3} more differences" if len(found) > 3 else ""
        raise AdapterError(
            got=f"The adapter in {folder} was trained on {trained_on if known else 'another model'}, and the model "
            f"here is {here}: {'; '.join(found[:3])}{more}.",
            need="An adapter only makes sense on the weights that it was trained with.",
            fix=f"Load {trained_on if known else 'the model it was trained on'} and put the adapter on that (its "
            "adapter_config.json names the base model), or use an adapter of the model here.",
        )


def _misfits(file: Path, base_model: nn.Module) -> list[str]:
    """Layers of an adapter file that ``base_model`` lacks or has in another shape, as phrases."""
    plain = plain_model(base_model)
    layers: dict[str, Any] = {name: without_adapters(layer) for name, layer in plain.named_modules()}
    found = []
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a dictionary
            shape = tensors.get_slice(key).get_shape()
            match = _KEY.fullmatch(key)
            name = match["layer"] if match else key.removeprefix("base_model.model.").rpartition(".")[0]
            layer = layers.get(re.sub(r"\.(base_layer|token_adapter)\b", "", name))
            if layer is None:
                found.append(f"there is no layer {name}")
            elif match:
                found += _misfit(name, match["part"], shape, layer)
            else:
                weight = getattr(layer, key.rpartition(".")[2], None)
                here = None if weight is None or is_4bit(weight) or is_8bit(weight) else list(weight.shape)
                if here not in (None, shape):
                    found.append(f"{name} is {here} here and {shape} in the adapter")
    return sorted(set(found))


def _misfit(name: str, part: str, shape: list[int], layer: Any) -> list[str]:
    """One LoRA factor against the input or output size of its layer."""
    takes_input = part.endswith("A")
    if isinstance(layer, nn.Embedding):
        size = layer.num_embeddings if takes_input else layer.embedding_dim
    elif isinstance(layer, Conv1D):
        size = layer.nx if takes_input else layer.nf
    elif hasattr(layer, "in_features"):
        size = layer.in_features if takes_input else layer.out_features
    else:  # expert parameters, convolutions: PEFT compares them when it loads
        return []
    theirs = shape[1] if takes_input else shape[0]
    way = "in" if takes_input else "out"
    return [] if size == theirs else [f"{name} has {size} {way}puts here and {theirs} in the adapter"]


def _versions() -> dict[str, str]:
    """Versions of this package and of those that shape what is saved."""
    found = {"pantheraml": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
