"""What a pipeline cannot be combined with: why, and what to do instead. It knows no torch."""

from __future__ import annotations

from pantheraml.errors import ConfigError

# (strategy, feature) -> (reason, instead)
REFUSED = {
    ("pipeline", "num_labels"): (
        "The stages of a pipeline end in the head of a language model, and a classifier has another one.",
        "Leave pipeline_parallel out: every GPU has a copy of the model.",
    ),
    ("pipeline", "torch_compile"): (
        "Stages are views of the model that one host launches in turn; what torch.compile makes of the whole model is "
        "not called.",
        "Leave torch_compile out: the fused layers have compiled kernels of their own.",
    ),
}


def refuse_with_pipeline(feature: str, value: object) -> None:
    """Say that a pipeline does not go with ``feature=value``.

    Raises:
        ConfigError: always.
    """
    reason, instead = REFUSED["pipeline", feature]
    raise ConfigError(got=f"A pipeline and {feature}={value!r} were asked for.", need=reason, fix=instead)
