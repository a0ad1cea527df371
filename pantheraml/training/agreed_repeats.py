"""What ranks agree on when a step is over on all of them: whether it is done, or else what its next attempt gives up.

A step that ran out of memory on any rank is undone on all. First passes become shorter, then layers keep less; what was
learnt holds for the steps that follow. Where nothing is left to reduce, all ranks end with the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.distributed.between_hosts import BetweenHosts
from pantheraml.distributed.strategies.held_reduction import Reduction
from pantheraml.errors import PantheraMLError
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.log import say
from pantheraml.models.less_memory import next_resort, restored_afterwards
from pantheraml.models.state import get_state
from pantheraml.training.memory_advice import Shorter, out_of_memory_error
from pantheraml.training.pass_limit import NO_LIMIT, PassLimit


@dataclass(kw_only=True)
class Attempt:
    """A step on its way.

    Attributes:
        go_back: undoes what has been noted and drawn since its beginning.
        failed: tokens of the pass that did not fit on this rank; None while all have.
        told: losses that were given back.
        longest: tokens of the longest pass so far.
    """

    go_back: Callable[[], None] | None = None
    failed: int | None = None
    told: list[Tensor] = field(default_factory=list[Tensor])
    longest: int = 0


class AgreedRepeats(Trainer):
    """The part of a trainer by which ranks agree whether a step is done."""

    # Whether a step that does not fit is repeated, and evaluation cut; else memory that runs out ends the run.
    repeats_steps = True
    _at_hand: Any = None
    # Of the model of this run; without a reduction its steps cannot be repeated.
    _reduced_model: nn.Module | None = None
    _reduction: Reduction | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._limit = PassLimit()
        super().__init__(*args, **kwargs)

    @cached_property
    def _hosts(self) -> BetweenHosts:
        """A way between the hosts of all ranks, made at the first question, which every one of them asks."""
        return BetweenHosts()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where memory is too short for a step as it is, it is made smaller, and as it was afterwards."""
        model = cast(nn.Module, self.model)
        try:
            with restored_afterwards(model):
                return super().train(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, PantheraMLError) or not is_out_of_memory(error):
                raise
            got = f"Memory ran out after step {self.state.global_step}, outside of what is repeated in smaller passes."
            raise self.out_of_memory(got, max(1, self._limit.proven)) from error
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """A run is over."""
        self._at_hand = self._reduction = self._reduced_model = None

    def out_of_memory(self, got: str, tokens: int) -> PantheraMLError:
        """The error of a run that cannot go on, since a pass of ``tokens`` does not fit."""
        return out_of_memory_error(got, self.model, self.args, tokens, self.shorter_rows(tokens))

    def shorter_rows(self, tokens: int) -> Shorter | None:
        """How rows of ``tokens`` are made shorter, where it is not by ``max_seq_length``."""
        del tokens
        return None

    def can_cut(self, step: Any, tokens: int) -> bool:
        """Whether passes of ``tokens`` in ``step`` can be shorter."""
        raise NotImplementedError

    def passes_are_shorter(self, most: int) -> None:
        """From now on a pass has up to ``most`` tokens."""

    def _all_have_done(self, step: Attempt, reduction: Reduction) -> bool:
        """Whether the step is done on all ranks; else it is undone, and its next attempt takes less.

        Raises:
            HardwareError: some rank has nothing left to reduce; raised on all of them.
        """
        model, failed = cast(nn.Module, self.model), step.failed
        # Of all ranks that failed, the one with the shortest pass, told as one number.
        mine, ranks = [NO_LIMIT, 1, 1], self.args.world_size
        if failed is not None:
            model.zero_grad()
            clear_gpu_cache()
            reduction.give_up()
            shortest = failed * ranks + self.args.process_index
            mine = [shortest, int(self.can_cut(step, failed)), int(next_resort(model) is not None)]
        shortest, can_cut, has_resort, proven = self._hosts.least([*mine, self._limit.proven])
        if shortest == NO_LIMIT:
            return True
        tokens, rank = divmod(shortest, ranks)
        reduction.undo()
        model.zero_grad()
        clear_gpu_cache()
        assert step.go_back is not None
        step.go_back()
        step.failed, step.longest = None, 0
        got = f"Step {self.state.global_step + 1} ran out of memory on rank {rank}, in a pass of {tokens:,} tokens"
        if not (can_cut or has_resort or reduction.adds_up):
            raise self.out_of_memory(f"{got}, and nothing is left to reduce.", tokens)
        say(
            f"{got}. It is repeated with the same gradient; {self._take_less(tokens, proven, cut=bool(can_cut))}."
        )
        return False

    def _take_less(self, tokens: int, proven: int, *, cut: bool) -> str:
        """Let passes be shorter, or the model keep less, from now on; what was done, as a clause."""
        if self._reduction is not None and self._reduction.adds_up:
            self._reduction.adds_up = False
            return "from now on gradients are reduced in every pass"
        if cut:
            most = self._limit.failed(tokens, proven)
            self.passes_are_shorter(most)
            return f"from now on a pass has up to {most:,} tokens"
        resort = next_resort(self.model)
        if resort is None:  # on this rank; another one has one
            return "another rank keeps less"
        resort.take()
        return f"from now on {resort.words}"

    def random_numbers(self) -> Callable[[], None]:
        """What sets random numbers back to where they are now."""
        state = get_state(cast(nn.Module, self.model))
        devices = [self.args.device] if state is None or state.split is None else state.split.devices
        gpus = [device for device in devices if device.type == "cuda"]
        drawn, drawn_there = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]

        def set_back() -> None:
            torch.set_rng_state(drawn)
            for gpu, there in zip(gpus, drawn_there, strict=True):
                torch.cuda.set_rng_state(there, gpu)

        return set_back
