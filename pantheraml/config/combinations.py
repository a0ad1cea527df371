"""What cannot be combined: why, and the nearest combination that works. What refuses something says what is here."""

from __future__ import annotations

from typing import NamedTuple

from pantheraml.errors import ConfigError


class Refusal(NamedTuple):
    """Why two things do not go together.

    Attributes:
        reason: a sentence.
        instead: what to write.
    """

    reason: str
    instead: str


_ZERO3_QUANTISED = Refusal(
    "ZeRO-3 cuts every weight into shards and gathers it as plain numbers; packed ones lose what unpacks them.",
    "Write zero_stage=2, which keeps frozen weights whole on each rank, or load_in_16bit=True.",
)

_CUT_QUANTISED = Refusal(
    "Packed weights are cut into blocks that do not follow rows and columns, so ranks cannot have a part each.",
    'Write load_in_16bit=True, or strategy="ddp" for a quantised copy on every GPU.',
)

_ZERO_TALKS = Refusal(
    "Where gradients are cut, or weights gathered, in every pass, ranks wait for one another in each, and would have "
    "different numbers of them.",
    "Raise per_device_train_batch_size, so that a pass has more tokens.",
)

# Features by ``Precision.storage``.
STORED = {"4bit": "4-bit", "8bit": "8-bit", "fp8": "FP8"}

# (what spreads the work, feature) -> why not.
REFUSED: dict[tuple[str, str], Refusal] = {
    ("fsdp", "8-bit"): Refusal(
        "The scales of 8-bit weights are made anew in every product, and ranks do not share them out.",
        'Write load_in_4bit=True, or device_map="balanced" to split the model by layers.',
    ),
    ("fsdp", "fp16"): Refusal(
        "Weights that are trained in full and shared out are computed with in bfloat16 where the GPU has it, and in "
        "float32 elsewhere.",
        "Leave bf16 and fp16 out of the arguments, or write strategy='ddp'.",
    ),
    ("fsdp", "keep_dequantized"): Refusal(
        "What ranks share out is in its place only while a layer is computed.",
        "Leave keep_dequantized out, or write shard_frozen=False if a GPU holds the model.",
    ),
    ("fsdp", "use_dora"): Refusal(
        "DoRA takes norms of whole weights when it begins, and each rank has a share of them.",
        "Drop use_dora=True, or write shard_frozen=False if a GPU holds the model.",
    ),
    ("fsdp", "init_lora_weights"): Refusal(
        "That start is computed from whole weights, and each rank has a share of them.",
        "Leave init_lora_weights out, or write shard_frozen=False if a GPU holds the model.",
    ),
    ("fsdp", "modules_to_save"): Refusal(
        "Modules whose weights ranks share out cannot be copied to be trained in full; the embedding and the head can.",
        "Leave layers to target_modules, which adapts them by LoRA.",
    ),
    ("fsdp", "target_parameters"): Refusal(
        "PEFT puts an adapter in the place of such a weight, where ranks put its shares together.",
        "Leave the projections of experts out of target_modules, or write shard_frozen=False if a GPU holds the model.",
    ),
    ("fsdp", "async_save"): Refusal(
        "each rank has a share of what is trained.",
        "Leave async_save out: the run waits for its checkpoints.",
    ),
    ("deepspeed, zero_stage=3", "4-bit"): _ZERO3_QUANTISED,
    ("deepspeed, zero_stage=3", "8-bit"): _ZERO3_QUANTISED,
    ("deepspeed, zero_stage=3", "FP8"): _ZERO3_QUANTISED,
    ("deepspeed, zero_stage=3", "fused kernels"): Refusal(
        "ZeRO-3 gathers the weights of a layer when its modules are called, and fused layers do not call them.",
        'Pass use_multi_gpu=MultiGPUConfig(strategy="deepspeed", zero_stage=3) to from_pretrained, or kernels="off".',
    ),
    ("deepspeed, zero_stage=0", "fp16"): Refusal(
        "DeepSpeed's optimizer for float16 alone rounds what ZeRO's do not, and trains otherwise.",
        "Write zero_stage=1, or bf16=True where the GPU has it.",
    ),
    ("deepspeed", "on_non_finite=restore"): Refusal(
        "DeepSpeed's engine loads a checkpoint only before its first step.",
        'Write on_non_finite="skip", which leaves such steps out, or strategy="ddp".',
    ),
    ("deepspeed, zero_stage=3", "merge_micro_batches"): _ZERO_TALKS,
    ("deepspeed, cut gradients", "merge_micro_batches"): _ZERO_TALKS,
    ("deepspeed, settings of its own", "out-of-memory repeats"): Refusal(
        "Some settings of DeepSpeed have it exchange or add up in a way that cannot be undone.",
        "Leave them out, or lower per_device_train_batch_size, where memory runs out.",
    ),
    ("deepspeed", "async_save"): Refusal(
        "each rank has a part of the state, and DeepSpeed writes it.",
        'Write strategy="ddp", or leave it out.',
    ),
    ("deepspeed", "another number of ranks"): Refusal(
        "A checkpoint of DeepSpeed has the optimizer's state in one part for each rank.",
        "Go on with as many ranks as it was saved by, or start a new run from its weights.",
    ),
    ("deepspeed, one process", "cpu_offload"): Refusal(
        "One process without ranks is trained without DeepSpeed's engine.",
        "Start it by accelerate launch --use_deepspeed --num_processes 1, or leave cpu_offload out.",
    ),
    ("tensor", "4-bit"): _CUT_QUANTISED,
    ("tensor", "8-bit"): _CUT_QUANTISED,
    ("tensor", "FP8"): _CUT_QUANTISED,
    ("tensor", "fused kernels"): Refusal(
        "Ranks add their parts of a layer up in the middle of what is fused.",
        "The norms, the attention, the head and the loss are the fused ones.",
    ),
    ("tensor", "full_finetuning"): Refusal(
        "What is trained with it are adapters, which every rank has whole; the parts of the layers are frozen.",
        'Drop full_finetuning=True to train an adapter, or write strategy="fsdp".',
    ),
    ("tensor", "experts"): Refusal(
        "The layers of a mixture of experts are not cut here.",
        'Write strategy="fsdp", or strategy="ddp" if a GPU holds the model.',
    ),
    ("tensor", "no plan"): Refusal(
        "transformers' plan for the architecture says which layers to cut by rows and which by columns.",
        'Write strategy="fsdp", or strategy="ddp" if a GPU holds the model.',
    ),
    ("tensor", "use_dora"): Refusal(
        "DoRA takes norms of whole weights in every forward, and each rank has a part of them.",
        'Drop use_dora=True, or write strategy="ddp" or strategy="fsdp".',
    ),
    ("tensor", "init_lora_weights"): Refusal(
        "That start is computed from whole weights, and each rank has a part of them.",
        'Leave init_lora_weights out, or write strategy="ddp" or strategy="fsdp".',
    ),
    ("tensor", "bias"): Refusal(
        "The biases of layers that are cut by rows are cut, too, and only adapters are trained.",
        'Write bias="none" and lora_bias=False, or strategy="ddp" or strategy="fsdp".',
    ),
    ("tensor", "modules_to_save"): Refusal(
        "Modules whose layers are cut, or that are given a part of the heads, cannot be trained in full; the "
        "embedding, the head and the norms between layers can.",
        "Leave layers to target_modules, which adapts them by LoRA, and the others out.",
    ),
    ("tensor", "target_parameters"): Refusal(
        "PEFT computes such weights whole, and each rank has a part of them.",
        "Name the layers in target_modules instead.",
    ),
    ("tensor", "another strategy"): Refusal(
        "The layers of the model were cut when it was loaded, and only ranks that compute them together train it.",
        "Pass the config that from_pretrained got, or none.",
    ),
    ("tensor", "whole model"): Refusal(
        "Layers are cut between ranks when the model is loaded.",
        "Pass use_multi_gpu=MultiGPUConfig(tensor_parallel=2), for example, to from_pretrained.",
    ),
    ("tensor", "device_map"): Refusal(
        "Each rank has one GPU, which its part of every layer goes to.",
        "Leave device_map out.",
    ),
    ("pipeline", "num_labels"): Refusal(
        "The stages of a pipeline end in the head of a language model, and a classifier has another one.",
        "Leave pipeline_parallel out: every GPU has a copy of the model.",
    ),
    ("pipeline", "torch_compile"): Refusal(
        "Stages are views of the model that one host launches in turn; what torch.compile makes of the whole model is "
        "not called.",
        "Leave torch_compile out: the fused layers have compiled kernels of their own.",
    ),
}


def refusal(spread: str, feature: str, got: str) -> ConfigError:
    """The error for a combination of the table; ``got`` says what was given."""
    reason, instead = REFUSED[spread, feature]
    return ConfigError(got=got, need=reason, fix=instead)
