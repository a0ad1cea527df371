"""Sizes of models without torch: shapes of Llama's kind, counted here by hand."""

from __future__ import annotations

from pantheraml.devices.activations import ActivationSizes
from pantheraml.devices.model_parts import ModelParts, PartSizes

GIB = 2**30
# hidden, inner, layers, heads, kv heads, vocabulary.
SHAPES = {
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "14B": (5120, 17408, 40, 40, 8, 151936),
    "32B": (5120, 25600, 64, 64, 8, 151936),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
TINY = (256, 512, 4, 8, 4, 1000)


def llama(shape=SHAPES["8B"], method="lora", rank=16):
    """``ModelParts`` of a shape, trained by a method; heads have 128 numbers, a tiny model's have 32."""
    hidden, inner, layers, heads, kv_heads, vocabulary = shape
    width = 128 if hidden > 1024 else 32
    queries, keys, full = heads * width, kv_heads * width, method == "full"
    stacks = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    stacks += [(inner, hidden), (inner, hidden), (hidden, inner)]
    linear = sum(rows * cols for rows, cols in stacks)
    adapter = rank * sum(rows + cols for rows, cols in stacks)
    storage = {"qlora": "4bit", "fp8": "fp8"}.get(method, "plain")
    size = 4 if full else 2
    held = {
        "4bit": linear // 2 + linear // 64 + linear // 4096,
        "fp8": linear + 4 * sum(rows for rows, _ in stacks),
    }.get(storage, linear * size)
    trained = linear + 2 * hidden if full else adapter
    end = vocabulary * hidden

    def part(weights, numbers, trainable, time):
        return PartSizes(weights, 12 * trainable + (0 if full else 4 * trainable), time, numbers, trainable)

    sizes = ActivationSizes(
        hidden=hidden, inner=inner, experts=0, heads=heads, queries=queries, keys=keys, vocabulary=vocabulary,
        size=size, is_fused=True, has_head_norms=False, compute=2 if full else 0,
        rank=0 if full else rank, is_trained=full,
    )  # fmt: skip
    return ModelParts(
        embedding=part(end * size, end, end * full, 0.0),
        layers=(part(held + 2 * hidden * size, linear + 2 * hidden, trained, 1.0),) * layers,
        head=part((end + hidden) * size, end + hidden, (end + hidden) * full, end / linear),
        tied=False,
        kept_per_token=sizes.kept.all,
        kept_when_recomputing=sizes.kept.attended,
        layer_passing=sizes.layer_passing,
        head_passing=sizes.head_passing,
        is_4bit=storage == "4bit",
        activations=sizes,
        storage=storage,
        full_finetuning=full,
        trained_size=4,
        used=float(linear),
    )
