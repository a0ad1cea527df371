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

# (what spreads the work, feature) -> why not.
REFUSED: dict[tuple[str, str], Refusal] = {
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
    ("deepspeed", "async_save"): Refusal(
        "each rank has a part of the state, and DeepSpeed writes it.",
        'Write strategy="ddp", or leave it out.',
    ),
    ("deepspeed", "out-of-memory repeats"): Refusal(
        "DeepSpeed reduces gradients and takes its step within the backward, which cannot be undone.",
        "Lower per_device_train_batch_size, where memory runs out.",
    ),
    ("deepspeed", "another number of ranks"): Refusal(
        "A checkpoint of DeepSpeed has the optimizer's state in one part for each rank.",
        "Go on with as many ranks as it was saved by, or start a new run from its weights.",
    ),
    ("deepspeed, one process", "cpu_offload"): Refusal(
        "One process without ranks is trained without DeepSpeed's engine.",
        "Start it by accelerate launch --use_deepspeed --num_processes 1, or leave cpu_offload out.",
    ),
}


def refusal(spread: str, feature: str, got: str) -> ConfigError:
    """The error for a combination of the table; ``got`` says what was given."""
    reason, instead = REFUSED[spread, feature]
    return ConfigError(got=got, need=reason, fix=instead)
