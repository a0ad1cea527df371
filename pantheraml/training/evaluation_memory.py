"""A batch of evaluation that does not fit goes through the model in parts of fewer rows.

HalvedForward   a rank does so by itself: what it exchanges with others comes after the model
AgreedForward   ranks wait for one another within the model, and cut their batches together
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.distributed.between_hosts import BetweenHosts
from pantheraml.distributed.process_group import get_rank, group_size
from pantheraml.distributed.strategies.gathered_passes import PassExchanges
from pantheraml.distributed.strategies.summed_passes import PassSums, StandIn
from pantheraml.errors import HardwareError
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.log import say
from pantheraml.training.pass_cuts import cut_batch, filler, num_tokens
from pantheraml.training.pass_limit import NO_LIMIT, PassLimit


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
            return _joined([self(**part) for part in parts], inputs)
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


class AgreedForward:
    """A model's forward without gradients, in which ranks wait for one another: each takes as many parts of its batch.

    A rank that fails takes part in what is left with a few tokens, and then all begin anew with shorter parts.

    Args:
        model: what is called, by every rank as often.
        limit: what is known of passes that did not fit, the same on all ranks; batches to come are cut by it, too.
        exchanges: of a pass of the model.
        hosts: a way between them.
    """

    def __init__(
        self, model: Any, limit: PassLimit, exchanges: PassExchanges | PassSums, hosts: BetweenHosts
    ) -> None:
        self._model, self._limit, self._exchanges, self._hosts = model, limit, exchanges, hosts
        self._failed: tuple[int, bool] | None = None

    def __call__(self, **inputs: Any) -> Any:
        """What the model answers, joined as ``HalvedForward`` does.

        Raises:
            HardwareError: a part that did not fit on some rank cannot be shorter; raised on all of them.
        """
        while True:
            parts = cut_batch(inputs, self._limit.most)
            is_cut = self._limit.most < NO_LIMIT
            missing = self._hosts.most(len(parts)) - len(parts) if is_cut else 0
            self._failed = None
            found = [self._part(part) for part in parts]
            for _ in range(missing):
                self._part(filler(inputs))
            if self._all_have_done():
                self._limit.passed(max(map(num_tokens, parts)))
                return found[0] if len(found) == 1 else _joined(found, inputs)

    def _part(self, part: dict[str, Any]) -> Any:
        """What the model answers; nothing, once one has failed."""
        tokens = num_tokens(part)
        if self._failed is None:
            try:
                with self._exchanges.counted(None):
                    return self._model(**part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._failed = tokens, len(cut_batch(part, tokens // 2)) > 1
            self._exchanges.failed()
            clear_gpu_cache()
        few = filler(part)
        with self._exchanges.counted(StandIn(num_tokens(few), tokens)):
            self._model(**few)
        return None

    def _all_have_done(self) -> bool:
        """Whether no rank has failed; else all of them take less from now on."""
        ranks, mine = group_size(), [NO_LIMIT, 1]
        if self._failed is not None:
            mine = [self._failed[0] * ranks + get_rank(), int(self._failed[1])]
        shortest, can_cut, proven = self._hosts.least([*mine, self._limit.proven])
        if shortest == NO_LIMIT:
            return True
        tokens, rank = divmod(shortest, ranks)
        got = f"evaluation ran out of memory on rank {rank} in a pass of {tokens:,} tokens"
        if not can_cut:
            raise HardwareError(
                got=f"{got[0].upper()}{got[1:]}.",
                need="It is one row, or cannot be cut.",
                fix="Shorten the rows of eval_dataset (max_length), or take GPUs with more memory.",
            )
        say(f"{got}; all go on with up to {self._limit.failed(tokens, proven):,}.")
        return False


def _joined(outputs: list[Any], inputs: dict[str, Any]) -> Any:
    """One output of transformers' from several; what is neither values of rows nor a number is left out."""
    dim = int(len(inputs["input_ids"]) == 1)  # parts of one row are documents of it
    joined: dict[str, Tensor] = {}
    for name, value in outputs[0].items():
        if isinstance(value, Tensor):
            values = [output[name] for output in outputs]
            joined[name] = torch.cat(values, dim) if value.dim() else torch.stack(values).mean()
    return type(outputs[0])(**joined)
