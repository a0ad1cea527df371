"""The completions of a generation: whole groups, whose rows are spread over optimizer steps alike on any ranks.

A prompt's group of G completions is G rows behind one another in the batch of all ranks, of which each rank has as many
in a row; a group may lie on two ranks. A generation of N rows serves S optimizer steps. transformers' and TRL's own way
is that each rank shuffles its rows; here, of every S rows behind one another, each goes to another step, in an order
that follows from the seed and their place: every step has the same rows on any number of ranks, and some of each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

from torch import Tensor
from trl import GRPOConfig

from pantheraml.errors import ConfigError
from pantheraml.log import say
from pantheraml.models.token_keys import mixed


def fill_groups(config: GRPOConfig, ranks: int) -> None:
    """Before a ``GRPOConfig`` plans its batches: let a generation hold whole groups.

    Args:
        config: with the fields as they were written, of which ``gradient_accumulation_steps`` is raised where neither
            it nor the size of a generation was.
        ranks: of the run.

    Raises:
        ConfigError: what was written holds no whole groups, in training or in evaluation.
    """
    _check_evaluation(config, ranks)
    rows = config.per_device_train_batch_size * ranks
    group, accumulation = config.num_generations or 1, config.gradient_accumulation_steps
    generation = config.generation_batch_size or rows * (config.steps_per_generation or accumulation)
    if generation % group == 0:
        return
    least = group // gcd(group, rows)
    if (
        config.generation_batch_size is not None
        or config.steps_per_generation is not None
        or accumulation != 1
    ):
        raise _no_whole_groups(config, ranks, generation)
    config.gradient_accumulation_steps = least
    say(
        f"a step of {rows} rows would cut groups of num_generations={group}: gradient_accumulation_steps={least} makes "
        f"it {rows * least}."
    )


def join_generation(config: GRPOConfig, ranks: int) -> None:
    """Let the size of a generation be that of these ranks, also where arguments were made before they were known.

    Args:
        config: changed in place.
        ranks: of the run.

    Raises:
        ConfigError: these ranks' generation, or batch of evaluation, would not hold whole groups.
    """
    steps = config.steps_per_generation or 1
    config.generation_batch_size = config.per_device_train_batch_size * ranks * steps
    if config.generation_batch_size % (config.num_generations or 1):
        raise _no_whole_groups(config, ranks, config.generation_batch_size)
    _check_evaluation(config, ranks)


def _check_evaluation(config: GRPOConfig, ranks: int) -> None:
    group = config.num_generations_eval or config.num_generations or 1
    rows = config.per_device_eval_batch_size * ranks
    if config.eval_strategy != "no" and rows % group:
        raise ConfigError(
            got=f"per_device_eval_batch_size={config.per_device_eval_batch_size} on {ranks} ranks is {rows} rows.",
            need=f"A batch of evaluation has whole groups of {group} completions.",
            fix=f"Write per_device_eval_batch_size={group // gcd(group, ranks)}, or num_generations_eval={ranks}.",
        )


def _no_whole_groups(config: GRPOConfig, ranks: int, generation: int) -> ConfigError:
    rows, group = config.per_device_train_batch_size * ranks, config.num_generations or 1
    accumulation = group // gcd(group, rows)
    fits = [n for n in range(2, generation + 1) if generation % n == 0]
    instead = f", or num_generations={min(fits, key=lambda n: abs(n - group))}" if fits else ""
    return ConfigError(
        got=f"A generation has {generation} rows ({config.per_device_train_batch_size} per device x {ranks} ranks x "
        f"{generation // rows or 1}), and num_generations={group}.",
        need="It holds whole groups, of num_generations completions each.",
        fix=f"Write gradient_accumulation_steps={accumulation} and leave generation_batch_size and "
        f"steps_per_generation out{instead}.",
    )


def describe_generation(config: GRPOConfig, ranks: int) -> str:
    """What a generation is, as a line of the log."""
    rows, steps = config.per_device_train_batch_size * ranks, config.steps_per_generation or 1
    group, updates = config.num_generations or 1, steps_served(config)
    serves = f", which serve {updates} optimizer steps" if updates > 1 else ""
    size = f"{rows * steps // group} prompts x {group} completions of up to {config.max_completion_length} tokens"
    return f"a generation is {size}{serves}; a step has {rows * config.gradient_accumulation_steps} of them."


def steps_served(config: GRPOConfig) -> int:
    """S: parts of a generation that each belong to one optimizer step."""
    steps = config.steps_per_generation or 1
    return steps // gcd(steps, config.gradient_accumulation_steps)


def spread(first: int, rows: int, parts: int, seed: int) -> list[int]:
    """The order in which a rank's rows are cut into micro-batches.

    Args:
        first: the number of its first row in the batch of all ranks; a multiple of ``parts``.
        rows: of this rank; likewise.
        parts: S; of every S rows behind one another, each goes to another part.
        seed: of the generation.

    Returns:
        Indices of the rank's rows, part after part, each as many.
    """
    part_of: list[int] = []
    for block in range(first, first + rows, parts):
        keys = [mixed(seed, block, place) for place in range(parts)]
        part_of += [sorted(keys).index(key) for key in keys]
    return sorted(range(rows), key=part_of.__getitem__)  # a stable sort


def reordered(batch: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A scored generation with its rows in another order; numbers that all rows share stay."""

    def take(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[list(order)] if isinstance(value, Tensor) else [value[index] for index in order]

    return {name: take(value) for name, value in batch.items()}
