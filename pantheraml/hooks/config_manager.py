"""The guides' ``ConfigManager``: arguments of ``enable_multi_gpu`` that are planned, kept in files, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pantheraml.config.source import dump_yaml, read_yaml
from pantheraml.errors import ConfigError, did_you_mean
from pantheraml.hooks.planning import arguments_of, choose
from pantheraml.hooks.settings import HookSettings
from pantheraml.log import say

# Arguments for usual wishes.
_TEMPLATES: dict[str, dict[str, Any]] = {
    "default": {},
    "low_memory": {"batch_size_per_gpu": 1, "enable_gradient_checkpointing": True},
    "fast": {"enable_gradient_checkpointing": "auto"},
    "debug": {"debug": True, "find_unused_parameters": True, "timeout_minutes": 5},
    "large_model": {"strategy": "fsdp", "shard_frozen": True, "enable_gradient_checkpointing": "auto"},
}


class ConfigManager:
    """Mappings that ``enable_multi_gpu(**config)`` takes."""

    def get_optimal_config(
        self,
        model_size: str = "7B",
        available_memory: str | None = None,
        num_gpus: int | None = None,
        max_seq_length: int = 2048,
        method: str = "lora",
    ) -> dict[str, Any]:
        """What the planner of ``pantheraml plan`` chooses for a model of ``FastLanguageModel``, and says why.

        Args:
            model_size: ``"7B"``, ``"1.5B"``, ``"350M"``, or the name or folder of a model.
            available_memory: of each GPU: ``"32GB"``, ``"24GiB"``, or a kind, ``"H200"``; None: what is free now.
            num_gpus: None: those that this process sees, or one.
            max_seq_length: tokens of the longest row.
            method: ``"lora"``, ``"qlora"`` (``load_in_4bit=True``), ``"fp8"`` or ``"full"``.

        Raises:
            ConfigError: no GPU to plan for, or nothing fits, with what would.
            ModelLoadError: no such model, or one that no family describes.
        """
        request, choice = choose(model_size, available_memory, num_gpus, max_seq_length, method)
        say(f"plan for {model_size}, {method}: {choice.plan.layout.describe()}; {choice.reason}.")
        return self.validate(arguments_of(request, choice.plan))

    def validate(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments, those that are not in ``config`` with their defaults.

        Raises:
            ConfigError: an argument that ``enable_multi_gpu`` would refuse.
        """
        return HookSettings.of(config).arguments

    def save_config(self, config: Mapping[str, Any], path: str | Path) -> Path:
        """Write a config that is valid as YAML; a file that is there is replaced."""
        file = Path(path).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_yaml(self.validate(config)), encoding="utf-8")
        return file

    def load_config(self, path: str | Path) -> dict[str, Any]:
        """Read what ``save_config`` or a person wrote, YAML or JSON.

        Raises:
            ConfigError: no such file, or something else than arguments of ``enable_multi_gpu``.
        """
        source = read_yaml(Path(path).expanduser())
        if source.problems:
            raise ConfigError("\n  ".join(f"{one.place.label}: {one.text}" for one in source.problems))
        return self.validate(source.data)

    def list_templates(self) -> list[str]:
        """Names that ``get_template`` knows."""
        return list(_TEMPLATES)

    def get_template(self, name: str) -> dict[str, Any]:
        """All arguments of a usual wish.

        Args:
            name: ``"default"``; ``"low_memory"``: one row at a time, everything recomputes; ``"fast"``: only what
                memory asks for recomputes; ``"debug"``: ranks compare what they train; ``"large_model"``: ranks share
                out the weights.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in _TEMPLATES:
            raise ConfigError(
                got=f"The template {name!r} was asked for.",
                need=f"There are {', '.join(_TEMPLATES)}.",
                fix=did_you_mean(name, _TEMPLATES) or "Take default.",
            )
        return self.validate(_TEMPLATES[name])
