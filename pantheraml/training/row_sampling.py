"""Sampling that follows the rows: which token is drawn is a function of the seed, the row and the place in it.

    u(seed, row, place) in [0, 1)          token = the first one whose cumulated probability exceeds u

torch draws for a batch from one generator, so that what a row gets depends on the rows beside it. Here a row gets the
same completion whichever rank generates it, and however many rows are generated together, up to rounding of the logits
that it is drawn from. Probabilities are added up as integers, in whichever order, so that sums have one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pantheraml.models.patching import changed_within
from pantheraml.models.token_keys import mixed

# What probabilities are multiplied by, and then rounded down: a token below 2^-48 is never drawn.
_UNITS = 2.0**48
# Rows whose sums exist at a time: three numbers of 8 bytes for each word of the vocabulary.
_ROWS = 64
# Steps of splitmix64 (Steele et al. 2014), as in models/sample_dropout.py.
_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniforms(seed: int, rows: Sequence[int], places: int) -> Tensor:
    """Numbers in [0, 1) that follow from the seed, the row and the place alone.

    Args:
        seed: any.
        rows: R numbers.
        places: P, counted from 0.

    Returns:
        (R, P) float64 on the CPU, multiples of 2^-53.
    """
    of_row = np.array([mixed(seed, row) for row in rows], dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = of_row[:, None] + np.arange(1, places + 1, dtype=np.uint64) * _STEP
        state = (state ^ state >> np.uint64(30)) * _FIRST
        state = (state ^ state >> np.uint64(27)) * _SECOND
        state ^= state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def drawn(scores: Tensor, u: Tensor) -> Tensor:
    """The tokens that ``u`` draws from ``softmax(scores)``.

    Args:
        scores: (B, V); -inf for what is never drawn.
        u: (B,) float64 in [0, 1).

    Returns:
        (B,) int64; -1 for a row with a score that is no number.
    """
    if len(scores) > _ROWS:
        return torch.cat([drawn(*part) for part in zip(scores.split(_ROWS), u.split(_ROWS), strict=True)])
    weights = (torch.softmax(scores.float(), dim=-1).double() * _UNITS).nan_to_num(0.0).long()
    cumulated = weights.cumsum(-1)
    total = cumulated[:, -1:]
    mark = (u[:, None] * total).long().minimum(total - 1)
    found = torch.searchsorted(cumulated, mark, right=True)[:, 0]
    return torch.where(total[:, 0] > 0, found, -1)


class RowSampler(LogitsProcessor):
    """The last processor of scores: it leaves each row the one token that its own numbers draw.

    Args:
        u: (B, P): ``uniforms`` of the rows that are generated.
    """

    def __init__(self, u: Tensor) -> None:
        self._u, self._prompt = u, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next tokens of ``input_ids`` (B, S): 0 for the token that is drawn, -inf for others.

        A row with a score that is no number keeps its scores, for transformers to refuse.
        """
        if self._prompt < 0:
            self._prompt = input_ids.shape[1]
            self._u = self._u.to(scores.device)
        tokens = drawn(scores, self._u[:, input_ids.shape[1] - self._prompt])[:, None]
        alone = torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(min=0), 0.0)
        return torch.where(tokens >= 0, alone, scores)


@contextmanager
def rows_sampled(model: PreTrainedModel, rows: Sequence[int], seed: int) -> Iterator[None]:
    """Let ``model.generate`` sample by rows within; greedy decoding and beams stay as they are.

    Args:
        model: the base model.
        rows: the number of each row that is generated, in all ranks' batch.
        seed: of this batch.
    """
    processors = partial(_processors, cast(Any, model)._get_logits_processor, rows, seed)
    with changed_within() as patches:
        patches.bind(model, "_get_logits_processor", processors, "samples follow the rows")
        yield


def _processors(
    before: Callable[..., LogitsProcessorList],
    rows: Sequence[int],
    seed: int,
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    *args: Any,
    **kwargs: Any,
) -> LogitsProcessorList:
    """transformers' processors, and ours behind them where one token is drawn for each row."""
    found = before(generation_config, *args, **kwargs)
    returned = generation_config.num_return_sequences or 1
    if generation_config.do_sample and (generation_config.num_beams or 1) == 1 and returned == 1:
        places = int(generation_config.max_new_tokens or generation_config.max_length)
        found.append(RowSampler(uniforms(seed, rows, places)))
    return found
