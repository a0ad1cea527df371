"""The scores of a micro-batch in several passes, and the gradient of whatever loss is made of them.

    scores = model(rows)            part by part, without a graph
    loss   = f(scores)              of the whole micro-batch; g = d loss / d scores
    weights' gradient += g[part] . d model(part) / d weights        part by part, each computed once more

A loss of GRPO depends on the model through the log-probabilities and entropies of its tokens alone, which no row takes
from another one. So it is the loss of the whole micro-batch, and has its gradient, however it is normalised, and
however the rows are cut (Gao et al. 2021, arXiv:2101.06983). What goes through in one pass keeps its graph in between,
and is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.distributed.strategies.held_reduction import Reduction
from pantheraml.errors import PantheraMLError
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.training.agreed_repeats import Attempt

# Rows of one pass; None for a few tokens that other ranks need this one to take.
Part = slice | None
# Log-probabilities (B, T), entropies (B, T) and a routers' loss (), each of them or None.
Scores = tuple[Tensor | None, ...]
Answer = TypeVar("Answer")


def parts_of(rows: int, most: int) -> list[slice]:
    """``rows`` in as few parts of up to ``most`` as there can be, all of nearly the same size."""
    each = -(-rows // -(-rows // max(1, most)))
    return [slice(at, min(at + each, rows)) for at in range(0, rows, each)]


class ScorePasses:
    """The two halves of the way of a micro-batch through the model: to its scores, and back from their gradient.

    A pass that does not fit is noted in ``attempt``, and no other one follows in it; where ranks wait for one another
    in passes, a few tokens take the place of each.

    Args:
        model: as it is wrapped.
        score: the scores of a part.
        parts: of the micro-batch; where ranks wait for one another in passes, as many on each.
        tokens: of a row.
        attempt: the step that it is of.
        reduction: of the gradients of ``model``.
        keyed: a context for a part, from its forward to the end of its backward, which may compute layers again.
        random_numbers: gives what sets random numbers back to where they are.
    """

    def __init__(
        self,
        model: nn.Module,
        score: Callable[[Part], Scores],
        parts: Sequence[Part],
        tokens: int,
        attempt: Attempt,
        *,
        reduction: Reduction,
        keyed: Callable[[Part], AbstractContextManager[None]],
        random_numbers: Callable[[], Callable[[], None]],
    ) -> None:
        self._model, self._score, self._parts, self._tokens = model, score, parts, tokens
        self._attempt, self._reduction = attempt, reduction
        self._keyed, self._random_numbers = keyed, random_numbers
        self._drawn: list[Callable[[], None]] = []
        # Of what goes through in one pass: the pass, which is not over, and the scores with their graph.
        self._open = ExitStack()
        self._kept: Scores | None = None

    def forward(self, *, is_last: bool) -> Scores | None:
        """The scores of all rows, without a graph; None where this rank has failed.

        Args:
            is_last: no other micro-batch of the step follows.
        """
        if len(self._parts) == 1:
            found = [self._pass(self._parts[0], lambda part: self._begin(part, is_last=is_last))]
        else:
            found = []
            for part in self._parts:
                self._drawn.append(self._random_numbers())
                found.append(self._pass(part, self._score_only))
        if self._attempt.failed is not None:
            return None
        told = [scores for scores in found if scores is not None]
        return tuple(
            None if values[0] is None else values[0].detach() if len(values) == 1 else torch.cat(values)
            for values in zip(*told, strict=True)
        )

    def backward(self, gradients: Sequence[Tensor | None], *, is_last: bool) -> None:
        """Add to the gradients of the weights.

        Args:
            gradients: of the loss with respect to the scores; None for those that it does not depend on.
            is_last: as for ``forward``.
        """
        if len(self._parts) == 1:
            self._pass(self._parts[0], lambda part: self._end(part, gradients, is_last=is_last))
            return
        last = len(self._parts) - 1
        for number, part in enumerate(self._parts):

            def again(part: Part, number: int = number) -> None:
                if part is not None:
                    self._drawn[number]()
                self._once_more(part, gradients, is_last=is_last and number == last)

            self._pass(part, again)

    def _pass(self, part: Part, run: Callable[[Part], Answer]) -> Answer | None:
        """What ``run`` answers for ``part``; None where that, or a pass before it, did not fit on this rank."""
        attempt = self._attempt
        if attempt.failed is None and part is not None:
            tokens = (part.stop - part.start) * self._tokens
            attempt.longest = max(attempt.longest, tokens)
            try:
                return run(part)
            except RuntimeError as error:
                if isinstance(error, PantheraMLError) or not is_out_of_memory(error):
                    raise
            attempt.failed = tokens  # the error, which held all that was computed, is gone here
            if self._reduction.talks_in_passes:
                self._model.zero_grad()
                self._reduction.pass_failed()
                clear_gpu_cache()
        if self._reduction.talks_in_passes:
            run(None)
        return None

    # --- in one pass ----------------------------------------------------------------------------------------

    def _begin(self, part: Part, *, is_last: bool) -> Scores:
        """The scores, in a pass that is over with its backward."""
        with ExitStack() as stack:
            stack.enter_context(self._reduction.around(is_last=is_last))
            stack.enter_context(self._keyed(part))
            self._kept = self._score(part)
            self._open = stack.pop_all()
        return self._kept

    def _end(self, part: Part, gradients: Sequence[Tensor | None], *, is_last: bool) -> None:
        """The backward of that pass; if it has failed in there, the pass once more with a few tokens."""
        kept, self._kept = self._kept, None
        if kept is None:
            self._once_more(None, gradients, is_last=is_last)
            return
        with self._open:
            _pull(kept, gradients, part)

    # --- in several -----------------------------------------------------------------------------------------

    def _score_only(self, part: Part) -> Scores:
        with torch.no_grad(), self._reduction.around(is_last=False), self._keyed(part):
            return self._score(part)

    def _once_more(self, part: Part, gradients: Sequence[Tensor | None], *, is_last: bool) -> None:
        with self._reduction.around(is_last=is_last), self._keyed(part):
            _pull(self._score(part), gradients, part)


def _pull(scores: Scores, gradients: Sequence[Tensor | None], part: Part) -> None:
    """Backward of ``scores``, those of ``part``, from what ``gradients`` are there; from zero, where it is none."""
    pairs = [
        (values, torch.zeros_like(values) if part is None or gradient is None else gradient[part])
        for values, gradient in zip(scores, gradients, strict=True)
        if values is not None and values.requires_grad and (part is None or gradient is not None)
    ]
    torch.autograd.backward([values for values, _ in pairs], [gradient for _, gradient in pairs])
