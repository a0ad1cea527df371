"""The loss of a training step, and its figures, which stay on the device until they are logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from trl import SFTConfig

from pantheraml.training.few_lengths import FILLED
from pantheraml.training.resuming import ResumedRows
from pantheraml.training.step_figures import StepFigures
from pantheraml.training.stopping import StoppableRuns


class StepLoss(StoppableRuns, ResumedRows):
    """The part of the trainer that computes the loss: TRL's, which waits for no device where it is the plain one."""

    # Whether our head is on the model, which knows the micro-batches of one pass from one another.
    _has_own_head = False
    # Micro-batches of the step at hand that have labels, of all ranks.
    _num_labelled: Tensor | int = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._figures = StepFigures()
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; in the plain case its figures stay on the device until they are logged."""
        filled = inputs.pop(FILLED, 0)
        if return_outputs or not self._loss_is_plain():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        output = model(**inputs, fused_lm_head=True)
        labels = output.label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        tokens = mask.sum() if mask is not None else ids.numel() - filled if ids is not None else 0
        tokens = tokens * output.label_mask.any()  # the row without labels of a rank that has run out of rows
        tokens = tokens * self._data_ranks.is_counted
        balance = self._balance(output, inputs) if self.aux_loss_enabled else None
        self._figures.add(
            output.log_probs, output.entropy, output.is_top1, output.label_mask, tokens, balance
        )
        loss = -output.log_probs.sum() / torch.as_tensor(labels).clamp(min=1)
        # Label tokens, and micro-batches, are those of all ranks, whose gradients are averaged; where ranks share rows,
        # they are counted by each.
        together = num_items_in_batch is not None and self.args.average_tokens_across_devices
        ranks = self.args.world_size if together else 1
        loss = loss * ranks
        if balance is not None:
            # Without the number of items, transformers takes the mean over micro-batches itself.
            count = 1 if num_items_in_batch is None else self._num_labelled
            loss = loss + self.router_aux_loss_coef * balance[0] * ranks / count
        return loss

    def _balance(self, output: Any, inputs: dict[str, Any]) -> Tensor:
        """(2,): the routers' losses of the micro-batches of a pass that have labels, summed, and how many these are."""
        groups = inputs.get("router_groups")
        labelled = output.label_mask.any().float()[None] if groups is None else groups["labelled"]
        return torch.stack([(output.aux_loss.reshape(-1) * labelled).sum(), labelled.sum()])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, of which those with labels are counted if routers have a loss of their own.

        That is the mean over them, so that a rank which has run out of rows weighs nothing.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.aux_loss_enabled and batches:
            labelled = [(batch["labels"][:, 1:] != -100).any() for batch in self.balanced_apart(batches)]
            count = torch.stack(labelled).sum().to(device)
            if self.args.world_size > 1 and self.args.average_tokens_across_devices:
                dist.all_reduce(count)
            self._num_labelled = count.clamp(min=1)
        return batches, num_items

    def balanced_apart(self, batches: list[Any]) -> list[Any]:
        """What of a step has a routers' loss of its own: each of its micro-batches."""
        return batches

    def _loss_is_plain(self) -> bool:
        """Whether the loss of this step is the plain negative log-likelihood, beside the routers' own."""
        return cast(nn.Module, self.model).training and self._is_nll()

    def _is_nll(self) -> bool:
        """Whether the loss of training steps is that one."""
        return (
            cast(SFTConfig, self.args).loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
        )

    def remember_figures(self) -> Callable[[], None]:
        """What forgets all figures that are noted from now on."""
        count, tokens = self._figures.count, self._total_train_tokens
        noted = {name: list(values) for name, values in self._metrics["train"].items()}

        def forget() -> None:
            self._figures.forget(count)
            self._total_train_tokens = tokens
            self._metrics["train"].clear()
            self._metrics["train"].update(noted)

        return forget

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the figures of the steps since the last line."""
        found = self._figures.take()
        if found is not None:
            self._total_train_tokens += found.tokens
            figures = self._metrics["train"]
            figures["entropy"] = [found.entropy]
            figures["mean_token_accuracy"] = [found.accuracy]
            figures["num_tokens"] = [self._total_train_tokens]
            if found.balance is not None:
                figures["aux_loss"] = [found.balance]
            logs.update(self.figures(self._total_train_tokens, logs))
        super().log(logs, start_time)

    def tokens_seen(self) -> int:
        """As ``RecordedRun``; those since the last log line are waiting among the figures."""
        return super().tokens_seen() + self._figures.waiting_tokens()

    def figures(self, tokens: int, logs: dict[str, float]) -> dict[str, float]:
        """What is logged beside the figures of the loss, after ``tokens`` of all ranks; nothing here."""
        return {}
