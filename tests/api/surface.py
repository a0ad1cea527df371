"""The public surface as plain text: names, signatures, errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / "public.json"

SAVING_METHODS = (
    "save_pretrained",
    "save_pretrained_merged",
    "push_to_hub",
    "push_to_hub_merged",
    "save_pretrained_gguf",
    "push_to_hub_gguf",
)
GPU_HELPERS = ("get_current_gpu_index", "set_gpu_device", "get_gpu_memory_info", "clear_gpu_cache")


def surface() -> dict[str, list[str]]:
    """Name -> what makes it up: parameters as ``name: kind = default``, or names, in their order."""
    import pantheraml
    from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments, errors
    from pantheraml.export.binding import bind_saving
    from pantheraml.kernels import utils
    from pantheraml.models.patching import PatchSet
    from tests import tiny

    found = {"pantheraml": sorted(name for name in dir(pantheraml) if name in pantheraml.__all__)}
    for name, value in vars(FastLanguageModel).items():
        if isinstance(value, staticmethod):
            found[f"FastLanguageModel.{name}"] = parameters(value.__func__)
    found["PantheraMLTrainer"] = parameters(PantheraMLTrainer)
    found["MultiGPUTrainer"] = parameters(pantheraml.MultiGPUTrainer)
    found["PantheraMLTrainer, methods of its own"] = sorted(
        name for name, value in vars(PantheraMLTrainer).items() if callable(value) and name[0] != "_"
    )
    found["PantheraMLTrainingArguments, fields of its own"] = [
        f"{entry.name}: {entry.type} = {entry.default!r}"
        for entry in dataclasses.fields(PantheraMLTrainingArguments)
        if entry.name in PantheraMLTrainingArguments.__annotations__
    ]
    for name in pantheraml.__all__:
        value = getattr(pantheraml, name)
        if inspect.isfunction(value):
            found[name] = parameters(value)
    model = tiny.build_model()
    bind_saving(model, PatchSet())
    for name in SAVING_METHODS:
        found[f"model.{name}"] = parameters(getattr(model, name))
    for name in GPU_HELPERS:
        found[f"kernels.utils.{name}"] = parameters(getattr(utils, name))
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            found[f"errors.{name}"] = [base.__name__ for base in value.__bases__]
    return found


def parameters(function: Callable[..., Any]) -> list[str]:
    """One line per parameter, such as ``r: positional or keyword = 16``."""
    return [
        f"{one.name}: {one.kind.description}" + ("" if one.default is one.empty else f" = {one.default!r}")
        for one in inspect.signature(function).parameters.values()
    ]


def lines(found: dict[str, list[str]]) -> list[str]:
    """Every entry with the name it belongs to, for a difference that can be read by itself."""
    return [f"{name} | {entry}" for name, entries in found.items() for entry in entries or ["(no parameter)"]]


def stored() -> dict[str, list[str]]:
    return json.loads(STORED.read_text(encoding="utf-8"))
