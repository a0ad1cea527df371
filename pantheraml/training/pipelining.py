"""Steps of a model that is split over several devices: its micro-batches follow one another through the stages.

The rows of a step (``per_device_train_batch_size`` x ``gradient_accumulation_steps``) are cut into micro-batches, which
all stages work on at the same time; the loss is that of the whole step, as ever. What the stages cannot do together
(losses that need the logits, or more than one forward) goes through the model one stage after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from pantheraml.config.multi_gpu import PER_GPU, MultiGPUConfig
from pantheraml.devices.flight import in_flight
from pantheraml.distributed.pipeline.step import TOKEN_KEYS, TOKEN_MASK, Context, Pipeline
from pantheraml.errors import ConfigError
from pantheraml.kernels.attention.layout import read_layout
from pantheraml.log import say_once
from pantheraml.models.recompute import prepare_recompute
from pantheraml.models.state import ModelState, get_state
from pantheraml.models.token_keys import mixed
from pantheraml.training.head import score, why_not_fused
from pantheraml.training.merging import MergedSteps
from pantheraml.training.router_balance import balance_loss, experts_per_token, router_sums
from pantheraml.training.sample_keys import KEYS, NUMBERS

Batch = dict[str, Any]


class _Labels(NamedTuple):
    """The labels of a micro-batch on the head's device: which of its (B * (S - 1)) positions have one, and which."""

    index: Tensor
    target: Tensor


class PipelinedSteps(MergedSteps):
    """The part of the trainer that pipelines split models."""

    _multi_gpu: MultiGPUConfig | None = None
    _pieces = 0  # into which each batch is cut; 0: stages compute one after the other
    _pipeline: Pipeline | None = None
    _step_size = 0

    def tainting(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch; a later part of the trainer adds to its gradient."""
        return loss

    def plan_pipeline(self) -> None:
        """Decide, before a run, whether stages compute at the same time, and on how many micro-batches.

        Raises:
            ConfigError: ``micro_batches`` does not go with the number of rows of a step.
        """
        state = get_state(cast(nn.Module, self.model))
        self._pieces, self._pipeline, self._waiting = 0, None, list[Batch]()
        asked = self._multi_gpu.micro_batches if self._multi_gpu is not None else None
        if state is None or state.split is None:
            _refuse_micro_batches(asked, "the model is whole on one device")
            return
        reason = self._why_not_pipelined(state)
        if reason is not None:
            _refuse_micro_batches(asked, reason)
            say_once(f"the stages of the model compute one after the other: {reason}.")
            return
        gpus, rounds = state.split.num_gpus, state.split.rounds
        count = self._num_micro_batches(asked, gpus)
        self._pieces = -(-count // self.args.gradient_accumulation_steps)
        count = self._pieces * self.args.gradient_accumulation_steps
        for index, stage in enumerate(state.split.stages[:gpus]):
            state.in_flight[stage.device] = in_flight(gpus - 1 - index, gpus, count, rounds)
        share = count / (count + (gpus - 1) / rounds)
        say_once(
            f"{gpus} devices with {rounds} stage{'s' * (rounds > 1)} each work on {count} micro-batches a step, "
            f"{share:.0%} of the time if they are equally fast."
        )

    def _num_micro_batches(self, asked: int | None, gpus: int) -> int:
        least, rows = self.args.gradient_accumulation_steps, self.args.per_device_train_batch_size
        if asked is None and self.aux_loss_enabled:
            say_once(
                "micro-batches are not cut any smaller, since the routers' loss is that of each one; more "
                "gradient_accumulation_steps keep more devices busy."
            )
            return least
        if asked is None:
            return min(least * rows, max(least, PER_GPU * gpus))
        if not least <= asked <= least * rows:
            raise ConfigError(
                got=f"MultiGPUConfig(micro_batches={asked}) was given.",
                need=f"A step of per_device_train_batch_size={rows} x gradient_accumulation_steps={least} rows is cut "
                f"into {least} to {least * rows} micro-batches.",
                fix=f"Leave micro_batches out, or set gradient_accumulation_steps={asked} for as many.",
            )
        return asked

    def _why_not_pipelined(self, state: ModelState) -> str | None:
        model = cast(Any, self.model)
        if state.family is None:
            return "no family describes where its parts are"
        if len(cast(Any, state.split).stages) < 2:
            return "all layers are on one device"
        model.train()
        if not self._loss_is_plain():
            return "the loss is not the plain one"
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            return "its adapter changes the input"
        if getattr(self.args, "activation_offloading", False):
            return "activation_offloading was asked for"
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        static = getattr(self.accelerator.ddp_handler, "static_graph", False)
        if self.args.world_size > 1 and (static or "lomo" in optim):
            return "gradients are to be reduced within the backward of the whole model"
        return why_not_fused(_base(model))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step, and the number of label tokens in all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.begin_step(len(batches))
        return batches, num_items

    def balanced_apart(self, batches: list[Batch]) -> list[Batch]:
        """As ``StepLoss``; in a pipeline each piece of a batch."""
        return [piece for batch in batches for piece in cut(batch, self._pieces)] if self._pieces else batches

    def begin_step(self, batches: int) -> None:
        """A step of so many batches begins; in a pipeline the last of them brings all through it."""
        self._step_size, self._waiting = batches, list[Batch]()

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; in a pipeline the last batch of a step brings all of them through it, the others nothing."""
        if not self._pieces:
            return super().training_step(model, inputs, num_items_in_batch).to(self.args.device)
        inputs.pop(NUMBERS, None)
        if KEYS in inputs:
            inputs[TOKEN_KEYS] = inputs.pop(KEYS)
        self._waiting.append(cast(Batch, self._prepare_inputs(inputs)))
        if len(self._waiting) < self._step_size:
            return torch.zeros((), device=self.args.device)
        batches, self._waiting = self._waiting, list[Batch]()
        return self._pipelined_step(model, batches, num_items_in_batch)

    def _pipelined_step(self, model: nn.Module, batches: list[Batch], num_items: Any) -> Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # optimizers without a schedule have modes, too
            cast(Any, self.optimizer).train()
        state = get_state(cast(nn.Module, self.model))
        base = _base(self.model)
        assert state is not None and state.family is not None and state.split is not None
        if self._pipeline is None:
            self._pipeline = Pipeline(base, state.family, state.split)
        # Batches are on the rank's first device; where the head is the embedding, that is on the last.
        batches = [_sent(batch, state.split.embedding) for batch in batches]
        pieces = [piece for batch in batches for piece in cut(batch, self._pieces)]
        prepare_recompute(base.base_model, state, max(piece["input_ids"].numel() for piece in pieces))
        head = state.split.head
        # Asked before anything is computed, so that the host waits for nothing later.
        labels = [_read_labels(piece["labels"], head) for piece in pieces]
        tokens = [_num_tokens(piece).to(head) for piece in pieces]
        carry = _count_routes(base.config.get_text_config(), pieces) if self.aux_loss_enabled else None
        settle_masks(pieces)
        # Gradients are averaged over ranks, whose label tokens (and micro-batches) are counted together.
        together = num_items is not None and self.args.average_tokens_across_devices
        ranks = self.args.world_size if together else 1
        if num_items is None:
            num_items = sum(one.index.numel() for one in labels)
        total = torch.as_tensor(num_items, device=head).clamp(min=1)
        num_labelled: Tensor | int = max(1, sum(one.index.numel() > 0 for one in labels))
        if together and carry is not None:
            num_labelled = torch.as_tensor(self._num_labelled, device=head)

        def loss(hidden: Tensor, i: int, routed: Tensor | None) -> Tensor:
            index, target = labels[i]
            found = score(base, hidden[:, :-1].flatten(0, 1)[index], target)
            labelled = float(index.numel() > 0)
            balance = None if routed is None else balance_loss(routed).sum() * labelled
            noted = None if balance is None else torch.stack([balance, torch.full_like(balance, labelled)])
            labelled_rows = torch.ones_like(target)
            self._figures.add(found.log_probs, found.entropy, found.is_top1, labelled_rows, tokens[i], noted)
            # Without labels every parameter is reached still.
            value = -found.log_probs.sum() * ranks / total if labelled else 0.0 * hidden.sum()
            if balance is not None:
                value = value + self.router_aux_loss_coef * balance * ranks / num_labelled
            return self.tainting(value)

        scaler = self.accelerator.scaler
        scale = (lambda value: value) if scaler is None else scaler.scale
        context = cast(Context, self.accelerator.autocast)
        seed = mixed(self.args.seed, self.state.global_step)  # as RankedRows draws it
        found = self._pipeline.step(
            pieces, loss, scale=scale, context=context, carry=carry, seed=seed, dropout=self._dropout
        )
        return found.to(self.args.device)


def _count_routes(config: Any, pieces: list[Batch]) -> Callable[[Sequence[Tensor], Tensor | None], Tensor]:
    """What a stage makes of its routers' logits; masks of padding stay for it, whatever becomes of attention's."""
    for piece in pieces:
        if piece.get("attention_mask") is not None:
            piece[TOKEN_MASK] = piece["attention_mask"]
    top_k = experts_per_token(config)
    assert top_k is not None  # why_not_fused
    return lambda logits, mask: router_sums(logits, top_k, mask)


def cut(batch: Batch, pieces: int) -> list[Batch]:
    """``batch`` in up to ``pieces`` parts of whole rows; what holds for all rows is in each of them."""
    rows = batch["input_ids"].shape[0]
    pieces = min(pieces, rows)
    parts: list[Batch] = [{} for _ in range(pieces)]
    for name, value in batch.items():
        has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        chunks = value.tensor_split(pieces) if has_rows else [value] * pieces
        for part, chunk in zip(parts, chunks, strict=True):
            part[name] = chunk
    return parts


def settle_masks(batches: list[Batch]) -> None:
    """Say of each batch what stages would otherwise ask its tensors, and wait for the answer.

    Padding behind the tokens of a row needs no mask: no token looks ahead, and what padding computes has no label.
    Documents of a packed row are given by their offsets.
    """
    masked = [batch for batch in batches if batch.get("attention_mask") is not None]
    needless = [_is_behind(batch["attention_mask"]) for batch in masked]
    for batch, is_needless in zip(masked, torch.stack(needless).tolist() if needless else [], strict=True):
        if is_needless:
            del batch["attention_mask"]
        else:
            say_once(
                'the host waits for every stage, since rows are padded in front; padding_side="right" avoids it.'
            )
    for batch in batches:
        positions = batch.get("position_ids")
        if positions is None or batch["input_ids"].shape[0] != 1 or "cu_seq_lens_q" in batch:
            continue
        length = positions.shape[1]
        layout = read_layout((1, length), positions.device, positions)
        offsets = layout.cu_seqlens
        if offsets is None:
            offsets = torch.arange(0, length + 1, length, dtype=torch.int32, device=positions.device)
        batch["cu_seq_lens_q"], batch["max_length_q"] = offsets, layout.max_seqlen


def _sent(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``."""
    return {
        name: one.to(device, non_blocking=True) if isinstance(one, Tensor) else one
        for name, one in batch.items()
    }


def _is_behind(mask: Tensor) -> Tensor:
    """Whether all padding of a mask (B, S) is behind the tokens; no for masks of another kind."""
    if mask.dim() != 2:
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    return (mask[:, 1:] <= mask[:, :-1]).all()


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _read_labels(labels: Tensor, device: torch.device) -> _Labels:
    target = labels[:, 1:].flatten()
    index = (target != -100).nonzero()[:, 0]
    return _Labels(index.to(device), target[index].to(device))


def _num_tokens(batch: Batch) -> Tensor:
    """Tokens that are not padding; none in a batch without labels, which stands for no row."""
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"].numel() if mask is None else mask.sum()
    return (batch["labels"][:, 1:] != -100).any() * tokens


def _refuse_micro_batches(asked: int | None, reason: str) -> None:
    if asked is not None:
        raise ConfigError(
            got=f"MultiGPUConfig(micro_batches={asked}) was given.",
            need=f"It is for models that are pipelined over several devices; here {reason}.",
            fix='Leave it out, or load the model with device_map="balanced".',
        )
