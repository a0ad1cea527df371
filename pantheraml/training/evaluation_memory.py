"""A batch of evaluation that does not fit goes through the model in parts of fewer rows.

A rank does so by itself: what it exchanges with others comes after the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.log import say
from pantheraml.training.pass_cuts import cut_batch, num_tokens
from pantheraml.training.pass_limit import PassLimit


class HalvedForward:
    """A model's forward without gradients, of which as many rows go through at a time as memory has room for.

    Args:
        model: what is called.
        limit: what is known of passes that did not fit; batches to come are cut by it, too.
    """

    def __init__(self, model: Any, limit: PassLimit) -> None:
        self._model, self._limit = model, limit

    def __call__(self, **inputs: Any) -> Any:
        """What the model answers: values of rows behind one another, single numbers as means over the parts."""
        parts = cut_batch(inputs, self._limit.most)
        if len(parts) > 1:
            # Parts of one row are documents of it.
            return _joined([self(**part) for part in parts], dim=int(len(inputs["input_ids"]) == 1))
        tokens = num_tokens(inputs)
        try:
            found = self._model(**inputs)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(cut_batch(inputs, tokens // 2)) == 1:
                raise
        else:
            self._limit.passed(tokens)
            return found
        clear_gpu_cache()
        most = self._limit.failed(tokens, self._limit.proven)
        say(f"evaluation ran out of memory in a pass of {tokens:,} tokens; it goes on with up to {most:,}.")
        return self(**inputs)


def _joined(outputs: list[Any], dim: int) -> Any:
    """One output of transformers' from several; what is neither values of rows nor a number is left out."""
    joined: dict[str, Tensor] = {}
    for name, value in outputs[0].items():
        if isinstance(value, Tensor):
            values = [output[name] for output in outputs]
            joined[name] = torch.cat(values, dim) if value.dim() else torch.stack(values).mean()
    return type(outputs[0])(**joined)
