"""The micro-batches of a step in one pass, without padding, where that is the same and memory allows.

A step of 4 x 2 short rows launches every kernel four times for a few hundred tokens each; a GPU then waits for its host
most of the time. The loss of a step is a sum over label tokens divided by their number in the whole step, so its
micro-batches may as well be documents of one row: attention keeps them apart, and no padding is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import RemoveColumnsCollator
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pantheraml.devices.memory import free_gpu_bytes
from pantheraml.distributed.between_hosts import BetweenHosts
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.errors import ConfigError
from pantheraml.log import say_once
from pantheraml.models.fused.attention import NAME
from pantheraml.models.packed_rows import documents_mix
from pantheraml.models.recompute import optimizer_bytes
from pantheraml.models.recompute_plan import most_tokens
from pantheraml.models.sharded_linear import tensor_group_of
from pantheraml.models.state import get_state
from pantheraml.training.few_lengths import FILLED, filled_length, repeated_tokens
from pantheraml.training.rank_batches import LABEL_AT, without_labels
from pantheraml.training.router_balance import Groups
from pantheraml.training.sample_keys import KEYS, NUMBERS
from pantheraml.training.step_loss import StepLoss

# Tokens beyond which a pass is no faster per token (H200, 8B: 8,192 tokens keep the GPU busy; twice that, to be sure).
MOST_TOKENS = 16384
_PER_TOKEN = ("input_ids", "labels", "position_ids")
_OF_TOKENS = (*_PER_TOKEN, KEYS)
Batch = dict[str, Any]


class FlatCollator:
    """TRL's collator with the rows of a batch behind one another: (1, tokens), and where each begins.

    Args:
        collator: the one of the trainer; not changed.
    """

    def __init__(self, collator: DataCollatorForLanguageModeling) -> None:
        self._collator = copy.copy(collator)
        self._collator.padding_free = True

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        """The batch on the CPU, with the offsets of its documents, and what the host needs to know of it as numbers."""
        found = self._collator(examples)
        positions, labels = found["position_ids"][0], found["labels"][0]
        starts = (positions == 0).nonzero().flatten()
        offsets = torch.cat([starts, torch.tensor([positions.numel()])]).to(torch.int32)
        batch = {name: found[name] for name in _PER_TOKEN}
        # The first token of a document follows nothing that could foretell it.
        label_at = ((labels != -100) & (positions > 0)).nonzero().flatten().numpy()
        return batch | {"cu_seq_lens_q": offsets, "lengths": offsets.diff().tolist(), LABEL_AT: label_at}


def merge_batches(
    batches: list[Batch], most: int, *, at_least: int = 0, grouped: bool = False, filled: bool = False
) -> list[Batch]:
    """As many batches as were given: neighbours joined up to ``most`` tokens, the joined one in the last place.

    The others are empty, so that whoever counts micro-batches counts as before.

    Args:
        batches: of ``FlatCollator``.
        most: tokens of one pass.
        at_least: passes that they are to be, if there are as many batches.
        grouped: say of each token which micro-batch it is from (``router_groups``), and leave none out.
        filled: fill passes up to one of a few lengths (``few_lengths``), not those that are grouped.
    """
    joined: list[Batch] = []
    for group in _passes(batches, most, at_least):
        joined += [_empty(batch) for batch in group[:-1]]
        joined.append(_joined(group, grouped=grouped, most=most if filled and not grouped else 0))
    return joined


def _passes(batches: list[Batch], most: int, at_least: int = 0) -> list[list[Batch]]:
    """Neighbours that go through the model together."""
    groups: list[list[Batch]] = []
    size = most
    for batch in batches:
        tokens = _tokens(batch)
        if size + tokens > most:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += tokens
    while len(groups) < min(at_least, len(batches)):
        sizes = [sum(map(_tokens, group)) if len(group) > 1 else 0 for group in groups]
        at = sizes.index(max(sizes))
        half = len(groups[at]) // 2
        groups[at : at + 1] = groups[at][:half], groups[at][half:]
    return groups


def _tokens(batch: Batch) -> int:
    return batch["input_ids"].numel()


def _empty(batch: Batch) -> Batch:
    return {name: batch[name][:, :0] for name in _OF_TOKENS if name in batch}


def _joined(group: list[Batch], *, grouped: bool, most: int) -> Batch:
    """One batch as the model takes it: (documents, length) where all have one length, which is faster; else one row,
    which is filled up to one of a few lengths if that is not above ``most``.

    What has no labels is left out, as long as something stays: a rank without any batch would hold up the others.
    ``label_index`` counts the labels among all positions but the first of a row, as the head does.
    """
    if not grouped:
        group = [batch for batch in group if batch[LABEL_AT].size] or group[:1]
    lengths = [length for batch in group for length in batch["lengths"]]
    beside: Batch = {}
    is_even = len(set(lengths)) == 1
    count = 0 if is_even else filled_length(sum(lengths), most) - sum(lengths)
    if count:
        group, beside = [*group, *_filling(group, count)], {FILLED: count}
    sizes, device = [batch["input_ids"].numel() for batch in group], group[0]["input_ids"].device
    starts = list(accumulate(sizes, initial=0))
    names = [name for name in _OF_TOKENS if all(name in batch for batch in group)]
    tokens = {name: torch.cat([batch[name] for batch in group], dim=1) for name in names}
    label_at = np.concatenate([batch[LABEL_AT] + start for batch, start in zip(group, starts, strict=False)])
    if all(NUMBERS in batch for batch in group):
        beside[NUMBERS] = np.concatenate([batch[NUMBERS] for batch in group])
    if grouped:
        numbers = np.repeat(np.arange(len(group)), sizes)
        labelled = np.array([batch[LABEL_AT].size > 0 for batch in group], dtype=np.float32)
        beside["router_groups"] = Groups(
            index=_sent(numbers, device), labelled=_sent(labelled, device), count=len(group)
        )
    if is_even:
        names = [name for name in names if name != "position_ids"]
        rows = {name: tokens[name].view(len(lengths), lengths[0]) for name in names}
        return rows | beside | {"label_index": _sent(label_at - label_at // lengths[0] - 1, device)}
    offsets: list[Tensor] = [group[0]["cu_seq_lens_q"][:1]]
    offsets += [batch["cu_seq_lens_q"][1:] + start for batch, start in zip(group, starts, strict=False)]
    beside |= {"cu_seq_lens_q": torch.cat(offsets), "max_length_q": max(lengths)}
    return tokens | beside | {"label_index": _sent(label_at - 1, device)}


def _filling(group: list[Batch], count: int) -> list[Batch]:
    """Batches of ``count`` tokens together, one document each, without labels (``few_lengths``)."""
    batch = max(group, key=lambda one: max(one["lengths"]))
    nothing, found = batch["cu_seq_lens_q"][:1], []
    for part in repeated_tokens(batch["lengths"], count):
        size = part.stop - part.start
        one = batch | {name: batch[name][:, part] for name in _OF_TOKENS if name in batch}
        one |= {"lengths": [size], "cu_seq_lens_q": torch.cat([nothing, nothing + size])}
        found.append(without_labels(one))
    return found


def _sent(numbers: Any, device: torch.device) -> Tensor:
    """An array of the host on ``device``, for which nobody waits."""
    found = torch.from_numpy(numbers)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


class MergedSteps(StepLoss):
    """The part of the trainer that merges micro-batches; ``merge_micro_batches`` of the arguments says whether."""

    _strategy: Strategy
    _hosts: BetweenHosts
    _most_tokens = 0
    _operations_per_token: int | None = None
    _unmerged: Sequence[Batch] = ()  # the micro-batches of the step at hand, as they were

    def plan_merging(self) -> None:
        """Decide, before a run, up to how many tokens go through the model in one pass; 0 merges nothing.

        Raises:
            ConfigError: ``merge_micro_batches=True`` was written where it cannot be done.
        """
        wanted = getattr(self.args, "merge_micro_batches", None)
        self._most_tokens = 0
        if wanted is False:
            return
        reason = self._why_not_merged(forced=bool(wanted))
        if reason is None:
            self._most_tokens = self._room()
        elif wanted:
            raise ConfigError(
                got="merge_micro_batches=True was given.",
                need=f"Micro-batches cannot be merged: {reason}.",
                fix="Leave it out.",
            )

    def _why_not_merged(self, *, forced: bool) -> str | None:
        model = cast(Any, self.model)
        state = get_state(model)
        if state is None:
            return "the model was not loaded by FastLanguageModel"
        if not isinstance(self._collator(), DataCollatorForLanguageModeling):
            return "a data_collator was given"
        if state.split is not None:
            return "the model is split over several devices"
        if self._strategy.why_not_merged is not None:
            return self._strategy.why_not_merged
        if model.config._attn_implementation != NAME:
            return "attention is not PantheraML's"
        if self.args.device.type != "cuda" and not forced:
            return "there is no GPU that would wait"
        if self.args.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
            return "as many go together as memory is free, and deterministic training was asked for"
        if state.recompute not in (False, "auto") and not forced:
            return "recompute was asked for, to save memory"
        if self.aux_loss_enabled and not (self._has_own_head and self._loss_is_plain()):
            return "the routers' loss is that of each micro-batch"
        return "documents of one row see one another in this model" if documents_mix(model) else None

    def _room(self) -> int:
        model = cast(Any, self.model)
        if self.args.device.type != "cuda":
            return MOST_TOKENS
        free = free_gpu_bytes(self.args.device) - optimizer_bytes(model)
        group = tensor_group_of(model)
        free = free if group is None else group.least(free)
        if self._strategy.talks_in_passes:  # all ranks merge, or none
            free = self._hosts.least([free])[0]
        room = min(MOST_TOKENS, most_tokens(model, free))
        say_once(f"micro-batches of a step are merged up to {room} tokens, without padding.")
        return room

    def _collator(self) -> Any:
        found = self.data_collator
        return found.data_collator if isinstance(found, RemoveColumnsCollator) else found

    def get_train_dataloader(self) -> Any:
        """TRL's, with rows behind one another where micro-batches are merged."""
        if not self._most_tokens:
            return super().get_train_dataloader()
        padded = self.data_collator
        self.data_collator = FlatCollator(self._collator())
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, merged, and the number of label tokens in all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._most_tokens:
            self._unmerged = batches
            # Without the number of label tokens, TRL averages over micro-batches, which then must stay what they are.
            most = self._most_tokens if num_items is not None else 0
            # Ranks that wait for one another in every pass have as many of them as the one that needs most.
            is_agreed = self._strategy.talks_in_passes
            at_least = self._hosts.most(len(_passes(batches, most))) if is_agreed else 0
            batches = self.merged(batches, most, at_least)
        return batches, num_items

    def merged(self, batches: list[Batch], most: int, at_least: int = 0) -> list[Batch]:
        """As many batches as were given, neighbours joined up to ``most`` tokens; see ``merge_batches``."""
        # TRL's losses would count what passes are filled up with.
        filled = self._has_own_head and self._is_nll()
        found = merge_batches(batches, most, at_least=at_least, grouped=self.aux_loss_enabled, filled=filled)
        if not self._has_own_head:
            for batch in found:
                batch.pop("label_index", None)
        return found

    def floating_point_ops(self, inputs: Batch) -> int:
        """What transformers computes; it counts all parameters anew for every micro-batch, which takes the host longer
        than a layer does.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            return super().floating_point_ops(inputs)
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops({"input_ids": ids.new_zeros((1, 1))})
        return self._operations_per_token * (ids.numel() - inputs.get(FILLED, 0))

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; nothing for a micro-batch that went into another one."""
        if self._most_tokens and inputs["input_ids"].numel() == 0:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)
