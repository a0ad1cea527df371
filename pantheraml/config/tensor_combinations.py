"""What cannot be combined with ranks that compute each layer together, why, and what works instead."""

from __future__ import annotations

from pantheraml.errors import ConfigError

# (strategy, feature): the reason, and the nearest combination that works.
REFUSED = {
    ("tensor", "quantised weights"): (
        "Packed weights are cut into blocks that do not follow rows and columns, so ranks cannot have a part each.",
        'Write load_in_16bit=True, or strategy="ddp" for a quantised copy on every GPU.',
    ),
    ("tensor", "full_finetuning"): (
        "What is trained with it are adapters, which every rank has whole; the parts of the layers are frozen.",
        'Drop full_finetuning=True to train an adapter, or write strategy="fsdp".',
    ),
    ("tensor", "experts"): (
        "The layers of a mixture of experts are not cut here.",
        'Write strategy="fsdp", or strategy="ddp" if a GPU holds the model.',
    ),
    ("tensor", "no plan"): (
        "transformers' plan for the architecture says which layers to cut by rows and which by columns.",
        'Write strategy="fsdp", or strategy="ddp" if a GPU holds the model.',
    ),
    ("tensor", "use_dora"): (
        "DoRA takes norms of whole weights in every forward, and each rank has a part of them.",
        'Drop use_dora=True, or write strategy="ddp" or strategy="fsdp".',
    ),
    ("tensor", "init_lora_weights"): (
        "That start is computed from whole weights, and each rank has a part of them.",
        'Leave init_lora_weights out, or write strategy="ddp" or strategy="fsdp".',
    ),
    ("tensor", "bias"): (
        "The biases of layers that are cut by rows are cut, too, and only adapters are trained.",
        'Write bias="none" and lora_bias=False, or strategy="ddp" or strategy="fsdp".',
    ),
    ("tensor", "modules_to_save"): (
        "Modules whose layers are cut, or that are given a part of the heads, cannot be trained in full; the "
        "embedding, the head and the norms between layers can.",
        "Leave layers to target_modules, which adapts them by LoRA, and the others out.",
    ),
    ("tensor", "target_parameters"): (
        "PEFT computes such weights whole, and each rank has a part of them.",
        "Name the layers in target_modules instead.",
    ),
    ("tensor", "another strategy"): (
        "The layers of the model were cut when it was loaded, and only ranks that compute them together train it.",
        "Pass the config that from_pretrained got, or none.",
    ),
    ("tensor", "whole model"): (
        "Layers are cut between ranks when the model is loaded.",
        "Pass use_multi_gpu=MultiGPUConfig(tensor_parallel=2), for example, to from_pretrained.",
    ),
    ("tensor", "device_map"): (
        "Each rank has one GPU, which its part of every layer goes to.",
        "Leave device_map out.",
    ),
}


def refusal(feature: str, got: str) -> ConfigError:
    """The error for ``feature`` with ranks that compute each layer together; ``got`` is what was given, a sentence."""
    need, fix = REFUSED["tensor", feature]
    return ConfigError(got=got, need=need, fix=fix)
