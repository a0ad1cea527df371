"""PantheraML: fine-tune language models; every GPU you have trains it.

Importing this package loads nothing heavy, sets no environment variable and patches nothing.
Each public name is loaded when it is first used.
"""

from __future__ import annotations

import gc
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from pantheraml.version import __version__

_EXPORTS: dict[str, str] = {
    "AggregationMethod": "training.aggregation",
    "FastLanguageModel": "fast_model",
    "FastModel": "fast_model",
    "MultiGPUConfig": "config.multi_gpu",
    "MultiGPUTrainer": "training.direct",
    "PantheraMLDistributedTrainer": "training.distributed",
    "PantheraMLGRPOTrainer": "training.grpo",
    "PantheraMLTrainer": "training.trainer",
    "PantheraMLTrainingArguments": "training.arguments",
    "UnslothDistributedTrainer": "training.distributed",
    "UnslothTrainer": "training.trainer",
    "UnslothTrainingArguments": "training.arguments",
    "all_reduce_scalar": "distributed.process_group",
    "barrier": "distributed.process_group",
    "broadcast_object": "distributed.process_group",
    "cleanup_multi_gpu": "distributed.process_group",
    "disable_grpo_support": "hooks.grpo",
    "disable_multi_gpu": "hooks.enable",
    "distributed_context": "distributed.process_group",
    "enable_grpo_support": "hooks.grpo",
    "enable_multi_gpu": "hooks.enable",
    "get_active_config": "hooks.enable",
    "get_chat_template": "data.chat_templates",
    "get_grpo_status": "hooks.grpo",
    "get_local_rank": "distributed.process_group",
    "get_multi_gpu_status": "hooks.enable",
    "get_optimal_config": "models.optimal_config",
    "get_rank": "distributed.process_group",
    "get_world_size": "distributed.process_group",
    "initialize_distributed": "training.initialize",
    "is_bfloat16_supported": "devices.inventory",
    "is_distributed_available": "distributed.process_group",
    "is_main_process": "distributed.process_group",
    "is_multi_gpu_enabled": "hooks.enable",
    "notebook_launch": "distributed.notebook",
    "setup_multi_gpu": "distributed.process_group",
    "standardize_data_formats": "data.conversations",
    "standardize_sharegpt": "data.conversations",
    "to_sharegpt": "data.conversations",
    "train_on_responses_only": "data.masking",
}

if TYPE_CHECKING:
    from pantheraml.config.multi_gpu import MultiGPUConfig
    from pantheraml.data.chat_templates import get_chat_template
    from pantheraml.data.conversations import standardize_data_formats, standardize_sharegpt, to_sharegpt
    from pantheraml.data.masking import train_on_responses_only
    from pantheraml.devices.inventory import is_bfloat16_supported
    from pantheraml.distributed.notebook import notebook_launch
    from pantheraml.distributed.process_group import (
        all_reduce_scalar,
        barrier,
        broadcast_object,
        cleanup_multi_gpu,
        distributed_context,
        get_local_rank,
        get_rank,
        get_world_size,
        is_distributed_available,
        is_main_process,
        setup_multi_gpu,
    )
    from pantheraml.fast_model import FastLanguageModel, FastModel
    from pantheraml.hooks.enable import (
        disable_multi_gpu,
        enable_multi_gpu,
        get_active_config,
        get_multi_gpu_status,
        is_multi_gpu_enabled,
    )
    from pantheraml.hooks.grpo import disable_grpo_support, enable_grpo_support, get_grpo_status
    from pantheraml.models.optimal_config import get_optimal_config
    from pantheraml.training.aggregation import AggregationMethod
    from pantheraml.training.arguments import PantheraMLTrainingArguments, UnslothTrainingArguments
    from pantheraml.training.direct import MultiGPUTrainer
    from pantheraml.training.distributed import PantheraMLDistributedTrainer, UnslothDistributedTrainer
    from pantheraml.training.grpo import PantheraMLGRPOTrainer
    from pantheraml.training.initialize import initialize_distributed
    from pantheraml.training.trainer import PantheraMLTrainer, UnslothTrainer

__all__ = [
    "AggregationMethod",
    "FastLanguageModel",
    "FastModel",
    "MultiGPUConfig",
    "MultiGPUTrainer",
    "PantheraMLDistributedTrainer",
    "PantheraMLGRPOTrainer",
    "PantheraMLTrainer",
    "PantheraMLTrainingArguments",
    "UnslothDistributedTrainer",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "__version__",
    "all_reduce_scalar",
    "barrier",
    "broadcast_object",
    "cleanup_multi_gpu",
    "disable_grpo_support",
    "disable_multi_gpu",
    "distributed_context",
    "enable_grpo_support",
    "enable_multi_gpu",
    "get_active_config",
    "get_chat_template",
    "get_grpo_status",
    "get_local_rank",
    "get_multi_gpu_status",
    "get_optimal_config",
    "get_rank",
    "get_world_size",
    "initialize_distributed",
    "is_bfloat16_supported",
    "is_distributed_available",
    "is_main_process",
    "is_multi_gpu_enabled",
    "notebook_launch",
    "setup_multi_gpu",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'pantheraml' has no attribute {name!r}")
    value = getattr(_load(f"pantheraml.{module}"), name)
    globals()[name] = value
    return value


def _load(module: str) -> ModuleType:
    """A module and what it needs: up to 4,000 others, among which nothing is garbage, so none is looked for meanwhile.

    That looking took a seventh of the time.
    """
    if not gc.isenabled():
        return import_module(module)
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.enable()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
