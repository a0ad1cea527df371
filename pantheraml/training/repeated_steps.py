"""A step that runs out of memory on any rank is repeated on all, in smaller passes, with the same gradient.

Nothing of a step has been used before it is done: gradients are zeroed, figures forgotten, random numbers set back, and
its micro-batches, which are kept until then, go through the model again. First in passes of fewer tokens (fewer
micro-batches together, then fewer rows), then with more recompute. What was learnt holds for the steps that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from pantheraml.devices.memory import describe_bytes
from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.distributed.strategies.gathered_passes import PassExchanges
from pantheraml.distributed.strategies.held_reduction import (
    GatheredWeights,
    Reduction,
    SummedLayers,
    exchanges_of,
)
from pantheraml.distributed.strategies.summed_passes import PassSums, StandIn
from pantheraml.errors import PantheraMLError
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.log import say, say_once
from pantheraml.models.less_memory import next_resort, restored_afterwards
from pantheraml.models.sharded_linear import tensor_group_of
from pantheraml.models.state import get_state
from pantheraml.training.banner import Predicted
from pantheraml.training.evaluation_memory import AgreedForward, HalvedForward
from pantheraml.training.finite_steps import FiniteSteps
from pantheraml.training.memory_advice import out_of_memory_error
from pantheraml.training.pass_cuts import cut_batch, cut_flat, filler, num_tokens
from pantheraml.training.pass_limit import NO_LIMIT, PassLimit
from pantheraml.training.whole_gradients import spare_bytes, whole_gradient_bytes, with_gradients

Batch = dict[str, Any]


@dataclass
class _Step:
    """A step on its way.

    Attributes:
        batches: its micro-batches as they are given to ``training_step``, which takes things out of them.
        has_count: whether the number of label tokens is known, so that micro-batches may be cut.
        turns: micro-batches that were given.
        go_back: undoes what has been noted and drawn since the first of them.
        failed: tokens of the pass that did not fit on this rank; None while all have.
        told: losses that were given back.
        longest: tokens of the longest pass so far.
    """

    batches: list[Batch]
    has_count: bool
    turns: int = 0
    go_back: Callable[[], None] | None = None
    failed: int | None = None
    told: list[Tensor] = field(default_factory=list[Tensor])
    longest: int = 0


class RepeatedSteps(FiniteSteps):
    """The part of the trainer that repeats steps for which memory was too short."""

    # Whether a step that does not fit is repeated, and evaluation cut; else memory that runs out ends the run.
    repeats_steps = True
    _at_hand: _Step | None = None
    # Of the model of this run; without a reduction its steps cannot be repeated.
    _reduced_model: nn.Module | None = None
    _reduction: Reduction | None = None
    # Of an evaluation outside of a training.
    _evaluated_model: nn.Module | None = None
    _eval_exchanges: PassExchanges | PassSums | None = None
    _may_cut = False
    # Whether gradients of what ranks share out wait for the last pass of a step.
    _adds_up = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._limit, self._eval_limit = PassLimit(), PassLimit()
        super().__init__(*args, **kwargs)

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
            raise out_of_memory_error(got, model, self.args, max(1, self._limit.proven)) from error
        finally:
            self._at_hand = self._reduction = self._reduced_model = self._evaluated_model = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, of which copies are kept until it is done."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        kept = [dict(batch) for batch in batches]
        self._at_hand = _Step(kept, num_items is not None) if batches else None
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; with the last micro-batch of a step all ranks agree whether it is done, or repeat it."""
        step = self._at_hand
        if step is None or not self._may_repeat(model):
            return super().training_step(model, inputs, num_items_in_batch)
        if step.go_back is None:
            step.go_back = self._remember()
        step.turns += 1
        is_last = step.turns == len(step.batches)
        if self._is_cut(step):  # the last micro-batch brings all of them
            loss = self._pass_all(model, step, num_items_in_batch) if is_last else self._no_loss()
        else:
            loss = self._pass(model, step, inputs, num_items_in_batch, is_last=is_last)
        if is_last:
            return self._settle(model, step, loss, num_items_in_batch)
        step.told.append(loss)
        return loss

    def plan_reduction(self, predicted: Predicted | None, passes: int) -> Predicted | None:
        """Decide, before a run, when gradients of what ranks train and share out are reduced; every rank asks.

        Args:
            predicted: what a step takes if they are reduced in every pass.
            passes: of a step.

        Returns:
            What it takes.
        """
        model = cast(nn.Module, self.model)
        size, self._adds_up = whole_gradient_bytes(model), False
        if not size or predicted is None or passes < 2 or torch.are_deterministic_algorithms_enabled():
            return predicted
        model.train()
        if not (self.repeats_steps and self._loss_is_plain()):  # nobody knows a step's last pass
            return predicted
        spare = self._hosts.least([spare_bytes(predicted)])[0]
        self._adds_up = size <= spare
        takes, free = describe_bytes(size), describe_bytes(spare)
        if self._adds_up:
            say_once(f"gradients are added up on each rank, in {takes}, and reduced in a step's last pass.")
            return with_gradients(predicted, size)
        say_once(f"gradients are reduced in every pass: they take {takes} on each rank, and {free} are free.")
        return predicted

    def prediction_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """TRL's; a batch of evaluation that does not fit goes through the model in parts."""
        if not self.repeats_steps:
            return super().prediction_step(model, inputs, *args, **kwargs)
        talks = self._strategy.talks_in_passes or tensor_group_of(cast(nn.Module, self.model)) is not None
        forward: Any = model
        if not talks:
            forward = HalvedForward(model, self._eval_limit)
        elif (exchanges := self._exchanges(model)) is not None:
            forward = AgreedForward(model, self._eval_limit, exchanges, self._hosts)
        return super().prediction_step(forward, inputs, *args, **kwargs)

    def _exchanges(self, model: nn.Module) -> PassExchanges | PassSums | None:
        """What ranks exchange in a pass; counted by one alone at a time, that of the training while there is one."""
        if isinstance(self._reduction, GatheredWeights | SummedLayers):
            return self._reduction.exchanges
        if self._evaluated_model is not model:
            self._evaluated_model, self._eval_exchanges = model, exchanges_of(model)
        return self._eval_exchanges

    def _may_repeat(self, model: nn.Module) -> bool:
        """Whether steps of ``model`` can be repeated, found out once a run; every rank asks at its first step."""
        if self._reduced_model is not model:
            self._reduced_model = model
            model.train()
            is_plain = self._loss_is_plain()
            # TRL's other losses talk to all ranks in every forward, and LOMO takes its step within the backward.
            optim = str(getattr(self.args.optim, "value", self.args.optim))
            is_possible = (
                self.repeats_steps and (is_plain or self.args.world_size == 1) and "lomo" not in optim
            )
            is_known = self.accelerator.distributed_type in (
                DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED
            )  # fmt: skip
            self._reduction = None
            if is_possible and is_known:
                self._reduction = self._strategy.reduction(self.accelerator, model)
            self._may_cut = is_plain
            if self._reduction is not None:
                self._reduction.adds_up = self._adds_up
        return self._reduction is not None

    def _is_cut(self, step: _Step) -> bool:
        """Whether its micro-batches go through the model otherwise than they are; ranks that talk in passes agree."""
        if self._reduction is not None and self._reduction.talks_in_passes:
            return self._limit.most < NO_LIMIT
        return self._tokens_at_a_time(step.batches) > self._limit.most

    # --- one attempt ----------------------------------------------------------------------------------------

    def _no_loss(self) -> Tensor:
        return torch.zeros((), device=self.args.device)

    def _pass(self, model: nn.Module, step: _Step, batch: Batch, num_items: Any, *, is_last: bool) -> Tensor:
        """Forward and backward of one pass, unless one has failed; one that does not fit is noted."""
        reduction = self._reduction
        assert reduction is not None
        if self._most_tokens and not num_tokens(batch):  # it went into another one, and is no pass
            return self._no_loss()
        if step.failed is None:
            tokens = self._tokens_at_a_time([batch])
            step.longest = max(step.longest, tokens)
            try:
                with reduction.around(is_last=is_last):
                    return super().training_step(
                        model, dict(batch), num_items
                    )  # which takes things out of it
            except RuntimeError as error:
                if isinstance(error, PantheraMLError) or not is_out_of_memory(error):
                    raise
            # The error, which held all that was computed, is gone here. In a pipeline all batches were on their way.
            step.failed = step.longest if self._pieces else tokens
            if reduction.talks_in_passes:
                model.zero_grad()
                reduction.pass_failed()
                clear_gpu_cache()
        if reduction.talks_in_passes:
            few = filler(batch)
            with reduction.around(is_last=is_last, stand_in=StandIn(num_tokens(few), num_tokens(batch))):
                super().training_step(model, few, num_items)
        return self._no_loss()

    def _pass_all(self, model: nn.Module, step: _Step, num_items: Any) -> Tensor:
        """All of a step in passes within the limit; the sum of their losses."""
        passes = self._passes(step, self._limit.most)
        if self._reduction is not None and self._reduction.talks_in_passes:
            count = self._hosts.most(len(passes))
            passes += [filler(step.batches[-1])] * (count - len(passes))
        self.begin_step(len(passes))
        losses = [
            self._pass(model, step, batch, num_items, is_last=number == len(passes))
            for number, batch in enumerate(passes, 1)
        ]
        return torch.stack(losses).sum()

    def _passes(self, step: _Step, most: int) -> list[Batch]:
        """The micro-batches of a step in passes of up to ``most`` tokens, as far as the loss allows it."""
        if not (step.has_count and self._may_cut):
            return step.batches
        if self._most_tokens:
            batches = list(self._unmerged)
            if not self.aux_loss_enabled:
                batches = [part for batch in batches for part in cut_flat(batch, most)]
            found = self.merged(batches, min(most, self._most_tokens))
            return [batch for batch in found if num_tokens(batch)]
        if self.aux_loss_enabled:  # the routers' loss is that of each micro-batch
            return step.batches
        return [part for batch in step.batches for part in cut_batch(batch, most * max(1, self._pieces))]

    def _tokens_at_a_time(self, batches: list[Batch]) -> int:
        """Tokens of the longest of these passes; in a pipeline, of the micro-batches that they are cut into."""
        return max(-(-num_tokens(batch) // max(1, self._pieces)) for batch in batches)

    # --- between attempts -----------------------------------------------------------------------------------

    def _settle(self, model: nn.Module, step: _Step, loss: Tensor, num_items: Any) -> Tensor:
        """Repeat until the step is done on all ranks; the part of its loss that has not been told yet."""
        reduction = self._reduction
        assert reduction is not None
        is_repeated = False
        while not self._all_have_done(step, reduction):
            loss, is_repeated = self._pass_all(model, step, num_items), True
        reduction.finish()
        self._limit.passed(step.longest)
        self._at_hand = None
        return loss - torch.stack(step.told).sum() if is_repeated and step.told else loss

    def _all_have_done(self, step: _Step, reduction: Reduction) -> bool:
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
            can_cut = self._tokens_at_a_time(self._passes(step, failed // 2)) < failed
            shortest = failed * ranks + self.args.process_index
            mine = [shortest, int(can_cut), int(next_resort(model) is not None)]
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
            raise out_of_memory_error(f"{got}, and nothing is left to reduce.", model, self.args, tokens)
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
            self._most_tokens = min(self._most_tokens, most)
            return f"from now on a pass has up to {most:,} tokens"
        resort = next_resort(self.model)
        if resort is None:  # on this rank; another one has one
            return "another rank keeps less"
        resort.take()
        return f"from now on {resort.words}"

    def _remember(self) -> Callable[[], None]:
        """What sets figures and random numbers back to where they are now."""
        state = get_state(cast(nn.Module, self.model))
        devices = [self.args.device] if state is None or state.split is None else state.split.devices
        gpus = [device for device in devices if device.type == "cuda"]
        forget_figures, drawn = self.remember_figures(), torch.get_rng_state()
        drawn_there = [torch.cuda.get_rng_state(gpu) for gpu in gpus]

        def go_back() -> None:
            forget_figures()
            torch.set_rng_state(drawn)
            for gpu, there in zip(gpus, drawn_there, strict=True):
                torch.cuda.set_rng_state(there, gpu)

        return go_back
