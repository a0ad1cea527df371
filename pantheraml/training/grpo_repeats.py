"""Steps of GRPO for which memory is too short are repeated, with the same completions, rewards and gradient.

What a step has computed counts when all ranks have done it: until then its micro-batches are kept, with completions and
advantages, and the figures of its loss are held back. A rank that fails gives zeros for scores, and so takes part in
what TRL's loss gathers from all ranks. Completions are never generated again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from pantheraml.distributed.strategies.base import Strategy
from pantheraml.distributed.strategies.held_reduction import lay_out_buckets
from pantheraml.models.sample_dropout import keyed
from pantheraml.models.token_keys import current_keys
from pantheraml.training.agreed_repeats import AgreedRepeats, Attempt
from pantheraml.training.memory_advice import Shorter
from pantheraml.training.pass_cuts import FEW
from pantheraml.training.pass_limit import NO_LIMIT
from pantheraml.training.rows_that_fit import Found, RowsThatFit
from pantheraml.training.score_passes import Part, ScorePasses, Scores, parts_of

Batch = dict[str, Any]
# What TRL counts, and what it steers the entropy bonus by.
_COUNTED = ("_step", "entropy_coef", "_last_world_entropy", "_entropy_window_stats")
# The methods that make a loss.
_LOSS = ("training_step", "compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")


@dataclass(kw_only=True)
class _Step(Attempt):
    """A step on its way.

    Attributes:
        count: its micro-batches.
        times: figures of ``step_time`` before it.
        seconds: that it has taken.
        batches: micro-batches, as they were scored, with what sets random numbers back to where they were before each.
        is_last: whether the micro-batch at hand is the last one.
        figures: of the loss, by name.
        passes: of the micro-batch at hand, between the two halves of its way.
        scores: of which its loss is made.
    """

    count: int
    times: int
    seconds: float = 0.0
    batches: list[tuple[Batch, Callable[[], None]]] = field(default_factory=list[Any])
    is_last: bool = False
    figures: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    passes: ScorePasses | None = None
    scores: Scores = ()


class RepeatedGRPOSteps(AgreedRepeats, GRPOTrainer):
    """The part of the GRPO trainer that goes on where memory runs out."""

    _strategy: Strategy
    _at_hand: _Step | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._generation, self._scoring = RowsThatFit("generation"), RowsThatFit("scoring of completions")
        super().__init__(*args, **kwargs)

    # --- what has no gradients ------------------------------------------------------------------------------

    def fitting(
        self, kind: RowsThatFit, run: Callable[[int], Found], rows: int, tokens: int, *, is_free: bool = True
    ) -> Found:
        """What ``run(n)`` gives, which takes up to ``rows`` of ``tokens`` each, n at a time, on this rank alone.

        Args:
            kind: of work.
            run: does it.
            rows: at most.
            tokens: of a row.
            is_free: whether rows may be taken apart.

        Raises:
            HardwareError: on some rank not even one row fits; raised on all of them.
        """
        if not (is_free and self.repeats_steps) or self._strategy.talks_in_passes:
            return run(rows)
        found = kind(run, rows, tokens)
        ranks, mine = self.args.world_size, self.args.process_index
        failed = self._hosts.least([mine if found is None else ranks])[0]
        if failed < ranks or found is None:
            got = (
                f"The {kind.what} ran out of memory on rank {failed} with one row of up to {tokens:,} tokens."
            )
            raise self.out_of_memory(got, tokens)
        return found

    # --- one attempt ----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, which begins."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        times = len(self._metrics["train"]["step_time"])
        self._at_hand = _Step(count=len(batches), times=times) if batches else None
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; with the last micro-batch of a step all ranks agree whether it is done, or repeat it."""
        step = self._at_hand
        if step is None or not self._may_repeat(model):
            return super().training_step(model, inputs, num_items_in_batch)
        began = time.perf_counter()
        loss = self._turn(model, step, inputs, is_last=len(step.batches) + 1 == step.count)
        if step.is_last:
            loss = self._settle(model, step, loss)
        else:
            step.told.append(loss)
        step.seconds += time.perf_counter() - began
        if step.is_last:
            self._metrics["train"]["step_time"][step.times :] = [step.seconds]
            self._current_train_step_time = 0.0
        return loss

    def _turn(self, model: nn.Module, step: _Step, inputs: Any, *, is_last: bool) -> Tensor:
        """A micro-batch on its way through the model and back."""
        step.is_last = is_last
        loss = super().training_step(model, inputs, None)
        passes, step.passes = step.passes, None
        assert passes is not None
        gradients = [None if values is None else values.grad for values in step.scores]
        step.scores = ()
        passes.backward(gradients, is_last=is_last)
        return loss if step.failed is None else torch.zeros_like(loss)

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        """TRL's, whose figures count when the step is done."""
        step = self._at_hand
        if step is None or self._reduction is None:
            return super()._compute_loss(model, inputs)
        if len(step.batches) < step.count:  # the first attempt
            step.go_back = step.go_back or self._remember(step)
            step.batches.append((inputs, self.random_numbers()))
        told, self._metrics["train"] = self._metrics["train"], step.figures
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._metrics["train"] = told

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **given: Any,
    ) -> Any:
        """TRL's; scores that a loss is made of come from as many passes as are needed, without their graph."""
        score = partial(super()._get_per_token_logps_and_entropies, model)
        rows, length = input_ids.shape
        if not torch.is_grad_enabled():
            return self.fitting(
                self._scoring,
                lambda most: score(input_ids, attention_mask, logits_to_keep, batch_size=most, **given),
                min(rows, batch_size or rows),
                length,
                is_free=not given.get("compute_aux_loss"),
            )
        step, reduction = self._at_hand, self._reduction
        if step is None or reduction is None:
            return score(input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **given)
        keys = current_keys(input_ids.numel())

        def of_part(part: Part) -> Scores:
            if part is None:
                ids = input_ids[:1, :FEW]
                return score(ids, torch.ones_like(ids), 1, **given)
            return score(input_ids[part], attention_mask[part], logits_to_keep, **given)

        def keyed_by(part: Part) -> AbstractContextManager[None]:
            if part is None or keys is None:
                return keyed(None)
            those = keys.keys.view(rows, -1)[part]
            return keyed(keys._replace(keys=those.reshape(-1), rows=len(those)))

        lay_out_buckets(model)
        step.passes = ScorePasses(
            model, of_part, self._parts(rows, length), length, step,
            reduction=reduction, keyed=keyed_by, random_numbers=self.random_numbers,
        )  # fmt: skip
        found = step.passes.forward(is_last=step.is_last)
        if found is None:
            zeros = torch.zeros(rows, logits_to_keep, device=input_ids.device)
            found = zeros, zeros.clone(), zeros.new_zeros(()) if given.get("compute_aux_loss") else None
        # Without a bonus the loss does not depend on the entropies, which TRL gathers.
        wanted = (True, self._entropy_bonus_enabled, True)
        step.scores = tuple(
            None if values is None else values.requires_grad_(is_wanted)
            for values, is_wanted in zip(found, wanted, strict=True)
        )
        return step.scores

    def _parts(self, rows: int, length: int) -> list[Part]:
        """The passes of a micro-batch; as many on all ranks where these wait for one another in passes."""
        parts: list[Part] = [*parts_of(rows, self._limit.most // length if self._may_cut else rows)]
        if self._strategy.talks_in_passes and self._limit.most < NO_LIMIT:
            parts += [None] * (self._hosts.most(len(parts)) - len(parts))
        return parts

    # --- between attempts -----------------------------------------------------------------------------------

    def _settle(self, model: nn.Module, step: _Step, loss: Tensor) -> Tensor:
        """Repeat until the step is done on all ranks; the part of its loss that has not been told yet."""
        reduction = self._reduction
        assert reduction is not None
        is_repeated = False
        while not self._all_have_done(step, reduction):
            loss, is_repeated = self._repeat(model, step), True
        reduction.finish()
        self._limit.passed(step.longest)
        self._at_hand = None
        for name, values in step.figures.items():
            self._metrics["train"][name] += values
        return loss - torch.stack(step.told).sum() if is_repeated and step.told else loss

    def _repeat(self, model: nn.Module, step: _Step) -> Tensor:
        """Another attempt at all of the step; the sum of its losses."""
        losses: list[Tensor] = []
        for number, (batch, set_back) in enumerate(step.batches, 1):
            set_back()
            is_last = number == step.count
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            losses.append(self._turn(model, step, batch, is_last=is_last))
        return torch.stack(losses).sum()

    def _remember(self, step: _Step) -> Callable[[], None]:
        """What sets back what TRL counts, and forgets the figures of ``step``; random numbers are each batch's."""
        counted = {name: getattr(self, name) for name in _COUNTED}

        def go_back() -> None:
            vars(self).update(counted)
            step.figures.clear()

        return go_back

    def _may_repeat(self, model: nn.Module) -> bool:
        """Whether steps of ``model`` can be repeated, found out once a run; every rank asks at its first step."""
        if self._reduced_model is not model:
            self._reduced_model, self._reduction = model, None
            optim = str(getattr(self.args.optim, "value", self.args.optim))
            is_known = self.accelerator.distributed_type in (
                DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU
            )  # fmt: skip
            # LOMO takes its step within the backward; a few tokens are no stand-in for images.
            is_possible = "lomo" not in optim and not (self._strategy.talks_in_passes and self._is_vlm)
            if self.repeats_steps and is_known and is_possible and _has_trls_loss(type(self)):
                self._reduction = self._strategy.reduction(self.accelerator, model)
        return self._reduction is not None

    @property
    def _may_cut(self) -> bool:
        """Whether rows can be told apart; the routers' loss is that of each micro-batch."""
        return not (self._is_vlm or self.aux_loss_enabled)

    def can_cut(self, step: Any, tokens: int) -> bool:
        """Whether passes of ``tokens`` in ``step`` can be shorter."""
        shapes = [
            (len(batch["prompt_ids"]), batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1])
            for batch, _ in step.batches
        ]
        longest = [parts_of(rows, tokens // 2 // length)[0].stop * length for rows, length in shapes]
        return self._may_cut and max(longest) < tokens

    def shorter_rows(self, tokens: int) -> Shorter:
        """Completions of half the length."""
        most = cast(GRPOConfig, self.args).max_completion_length or 0
        return Shorter("max_completion_length", max(1, tokens - most // 2))


def _has_trls_loss(trainer: type[GRPOTrainer]) -> bool:
    """Whether the loss of such a trainer is TRL's; one of a script may go through the model in ways of its own."""
    methods = [getattr(trainer, name).__module__.split(".")[0] for name in _LOSS]
    return set(methods) <= {"pantheraml", "trl"}
