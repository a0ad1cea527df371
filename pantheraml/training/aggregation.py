"""How the gradients of ranks become the gradient of a step.

With g_r the gradient of rank r's loss on its part of a batch, w_r what that part weighs, and the sums over the ranks
that have a part:

    MEAN        sum g_r / their number
    SUM         sum g_r                        for losses that are sums over rows
    WEIGHTED    sum w_r g_r / sum w_r          for losses that are means: the gradient of the whole batch, exactly
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal, cast

import torch
from torch import nn

from pantheraml.errors import ConfigError, DataError

# What a part of a batch weighs, by its name or as a function of the part.
Weight = Literal["auto", "rows", "tokens"] | Callable[[Any], float]


class AggregationMethod(StrEnum):
    """What becomes of the ranks' gradients."""

    MEAN = "mean"
    SUM = "sum"
    WEIGHTED = "weighted"

    def factors(self, weights: Sequence[float]) -> list[float]:
        """By what the loss of each rank is multiplied before all are summed.

        Args:
            weights: of the ranks' parts; 0 has no part.
        """
        if self is AggregationMethod.WEIGHTED:
            return [weight / (sum(weights) or 1) for weight in weights]
        has_part = [float(weight > 0) for weight in weights]
        return (
            has_part if self is AggregationMethod.SUM else [part / (sum(has_part) or 1) for part in has_part]
        )


def method_of(value: object) -> AggregationMethod:
    """A method from itself or its name.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return AggregationMethod(value)
    except ValueError:
        raise ConfigError(
            got=f"aggregation_method={value!r} was given.",
            need="It is AggregationMethod.MEAN, SUM or WEIGHTED.",
            fix="Leave it out for the mean.",
        ) from None


def weight_of(part: Any, rows: int, weigh_by: Weight, module: nn.Module) -> float:
    """What a part of a batch weighs.

    Args:
        part: as the module takes it.
        rows: of it.
        weigh_by: ``"tokens"`` counts labels that are not -100, ``"auto"`` does so where a row has several labels;
            or a function of the part.
        module: transformers' causal language models leave out the first label of each row.

    Raises:
        ConfigError: tokens are to be counted of parts without labels.
        DataError: the function returns no number of 0 or more.
    """
    if callable(weigh_by):
        weight = float(weigh_by(part))
        if not 0 <= weight < float("inf"):
            raise DataError(
                got=f"weigh_by returned {weight} for {rows} rows.",
                need="A part of a batch weighs 0 or more.",
                fix="Return its number of tokens or rows, for example.",
            )
        return weight
    labels = cast("Mapping[str, Any]", part).get("labels") if isinstance(part, Mapping) else None
    has_several = isinstance(labels, torch.Tensor) and labels.ndim > 1 and not labels.is_floating_point()
    if weigh_by == "rows" or (weigh_by == "auto" and not has_several):
        return rows
    if not isinstance(labels, torch.Tensor):
        raise ConfigError(
            got='weigh_by="tokens" was given, and the batches have no "labels".',
            need="Tokens are counted where labels are not -100.",
            fix="Give batches that are mappings with labels, or weigh_by=a function of the batch.",
        )
    if getattr(module, "loss_type", None) == "ForCausalLM":
        labels = labels[..., 1:]
    return int((labels != -100).sum())
