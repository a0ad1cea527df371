"""A training step of a split model: its micro-batches through all stages, forward and backward.

One host launches everything, in the order of the schedule, and waits for no device. Each stage has a graph of its own
for each micro-batch, from what arrived to what leaves; gradients go back the way the activations came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pantheraml.distributed.pipeline.link import Link, Parcel
from pantheraml.distributed.pipeline.schedule import one_forward_one_backward
from pantheraml.distributed.pipeline.stage import Stage, build_stages
from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer
from pantheraml.models.sample_dropout import Followed, keyed
from pantheraml.models.split import Split
from pantheraml.models.token_keys import TokenKeys

Batch = dict[str, Any]
Context = Callable[[], AbstractContextManager[Any]]
Loss = Callable[[Tensor, int, Tensor | None], Tensor]
# From the logits (T, E) of a stage's routers and a mask of its T tokens to what is added up over the stages.
Carry = Callable[[Sequence[Tensor], Tensor | None], Tensor]
# Where a batch says which of its tokens are no padding, for ``Carry`` alone.
TOKEN_MASK = "token_mask"
# Where it says which token of which sample each of them is, for dropout that follows the samples.
TOKEN_KEYS = "token_keys"
# What the stages have no use for: tokens go through the embedding, labels into the loss.
_NOT_FOR_STAGES = ("input_ids", "labels")


class Pipeline:
    """The stages of a model and the ways between them; for as long as the model's layers stay what they are.

    Args:
        model: the causal language model, without wrappers.
        family: where its parts are.
        split: where they lie.
    """

    def __init__(self, model: Any, family: ModelFamily, split: Split) -> None:
        self.stages = build_stages(model, family, split)
        self.gpus, self.rounds = split.num_gpus, split.rounds
        self._embedding: nn.Module = model.get_submodule(family.embedding)
        layers = model.get_submodule(family.layers).children()
        self._readers = [layer.reader for layer in layers if isinstance(layer, FusedDecoderLayer)]
        devices = [split.embedding, *(stage.device for stage in self.stages)]
        pairs = list(pairwise(devices))
        # To stage s from the one before, or from the embedding, and back.
        self._forth = [Link(before, after) for before, after in pairs]
        self._back = [Link(after, before) for before, after in pairs]
        self._inputs = [Link(split.embedding, stage.device) for stage in self.stages]
        self._lookup: torch.cuda.Stream | None = None
        if split.embedding != devices[1] and split.embedding.type == "cuda":
            self._lookup = torch.cuda.Stream(split.embedding)

    def step(
        self,
        batches: Sequence[Batch],
        loss: Loss,
        *,
        scale: Callable[[Tensor], Tensor] = lambda value: value,
        context: Context = nullcontext,
        carry: Carry | None = None,
        seed: int = 0,
        dropout: Followed | None = None,
    ) -> Tensor:
        """Forward and backward of all micro-batches; gradients are added to those that are there.

        Args:
            batches: what the model is given for each micro-batch, on the embedding's device.
            loss: the loss of micro-batch ``i`` from the last stage's output (B, S, H) and what was carried to it (None
                without ``carry``); they are summed.
            scale: what is differentiated instead of the loss (a gradient scaler's).
            context: entered for each forward (autocast).
            carry: what each stage adds up beside its output, where routers of experts have a loss of their own.
            seed: of the step, for dropout that follows the samples (``TOKEN_KEYS``).
            dropout: what does; None: adapters alone.

        Returns:
            The sum of the losses, detached, on the device of ``loss``.
        """
        with self._unchanging():
            token_keys = partial((dropout or Followed()).keys, seed=seed)
            return _Step(self, batches, loss, scale, context, carry, token_keys).run()

    @contextmanager
    def _unchanging(self) -> Iterator[None]:
        """Weights and adapters stay what they are within: layers read them once for all micro-batches."""
        for reader in self._readers:
            reader.hold(True)
        try:
            yield
        finally:
            for reader in self._readers:
                reader.hold(False)

    def embed(self, ids: Tensor) -> tuple[Tensor, Parcel]:
        """The embeddings of ``ids``, and the same on their way to the first stage.

        Where the embedding lies with the head, on the last device, it is looked up beside what that computes.
        """
        if self._lookup is None:
            found = self._embedding(ids)
            return found, self._forth[0].send(found.detach())
        with torch.cuda.stream(self._lookup):
            found = self._embedding(ids)
            return found, self._forth[0].send(found.detach())

    def begin(self) -> None:
        """Let lookups of a step see the weights that the last one gave."""
        if self._lookup is not None:
            self._lookup.wait_stream(torch.cuda.current_stream(self._lookup.device))

    def send_on(self, stage: int, hidden: Tensor) -> Parcel:
        """An output of ``stage`` on its way to the next one."""
        return self._forth[stage + 1].send(hidden)

    def send_back(self, stage: int, gradient: Tensor) -> Parcel:
        """The gradient of what ``stage`` was given on its way to where that came from."""
        return self._back[stage].send(gradient)

    def send_inputs(self, stage: int, batch: Batch) -> dict[str, Any]:
        """What ``stage`` needs of a batch, its tensors as parcels."""
        link = self._inputs[stage]
        needed = {name: one for name, one in batch.items() if name not in _NOT_FOR_STAGES}
        return {name: link.send(one) if isinstance(one, Tensor) else one for name, one in needed.items()}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Let kernels that ask for the current device find this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Step:
    """One step on its way."""

    def __init__(
        self,
        pipeline: Pipeline,
        batches: Sequence[Batch],
        loss: Loss,
        scale: Callable[[Tensor], Tensor],
        context: Context,
        carry: Carry | None,
        token_keys: Callable[[Tensor | None], TokenKeys | None],
    ) -> None:
        self._pipeline, self._batches, self._loss, self._scale = pipeline, batches, loss, scale
        self._context, self._carry, self._token_keys = context, carry, token_keys
        self._stages: list[Stage] = pipeline.stages
        # All of them before anything is computed: later they would wait for what is launched until then.
        self._inputs = [
            [pipeline.send_inputs(stage, batch) for batch in batches] for stage in range(len(self._stages))
        ]
        self._arriving: dict[tuple[int, int], list[Parcel]] = {}
        self._returning: dict[tuple[int, int], list[Parcel]] = {}
        self._embedded: dict[int, Tensor] = {}
        self._held: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        self._keys: dict[tuple[int, int], TokenKeys | None] = {}
        self._total: Tensor | None = None

    def run(self) -> Tensor:
        gpus, rounds = self._pipeline.gpus, self._pipeline.rounds
        self._pipeline.begin()
        for task in one_forward_one_backward(gpus, len(self._batches), rounds):
            (self._forward if task.is_forward else self._backward)(task.stage, task.micro_batch)
        assert self._total is not None
        return self._total

    def _forward(self, index: int, i: int) -> None:
        stage = self._stages[index]
        with self._context(), _on(stage.device):
            entered = self._enter(index, i)
            inputs = self._inputs[index][i]
            batch = {name: one.open() if isinstance(one, Parcel) else one for name, one in inputs.items()}
            mask, keys = batch.pop(TOKEN_MASK, None), batch.pop(TOKEN_KEYS, None)
            keys = self._keys[index, i] = self._token_keys(keys)
            with keyed(keys):
                hidden, logits = stage.forward(entered[0], batch, routers=self._carry is not None)
            carried = None if self._carry is None else self._carry(logits, mask)
            if carried is not None and index > 0:
                carried = carried + entered[1]
            if stage.is_last:
                loss = self._loss(hidden, i, carried)
                self._total = loss.detach() if self._total is None else self._total + loss.detach()
                outputs = [loss]
            else:
                outputs = [hidden] if carried is None else [hidden, carried]
        self._held[index, i] = entered, outputs
        if not stage.is_last:
            self._arriving[index + 1, i] = [
                self._pipeline.send_on(index, output.detach()) for output in outputs
            ]

    def _enter(self, index: int, i: int) -> list[Tensor]:
        """What the stage computes with: the beginning of its graph."""
        needs_gradient = index > 0
        if index == 0:
            embedded, parcel = self._pipeline.embed(self._batches[i]["input_ids"])
            self._arriving[0, i] = [parcel]
            needs_gradient = embedded.requires_grad
            if needs_gradient:
                self._embedded[i] = embedded
        return [one.open().detach().requires_grad_(needs_gradient) for one in self._arriving.pop((index, i))]

    def _backward(self, index: int, i: int) -> None:
        entered, outputs = self._held.pop((index, i))
        with keyed(self._keys.pop((index, i))):  # layers that recompute drop again what they dropped
            self._differentiate(index, i, outputs)
        gradients = [one.grad for one in entered if one.grad is not None]
        if len(gradients) < len(entered):
            return  # nothing before this stage is trained
        parcels = [self._pipeline.send_back(index, gradient) for gradient in gradients]
        if index > 0:
            self._returning[index - 1, i] = parcels
        else:
            torch.autograd.backward(self._embedded.pop(i), parcels[0].open())

    def _differentiate(self, index: int, i: int, outputs: list[Tensor]) -> None:
        """The backward of the stage, from its loss or from what the next one sent back."""
        if self._stages[index].is_last:
            torch.autograd.backward(self._scale(outputs[0]))
            return
        returned = [parcel.open() for parcel in self._returning.pop((index, i), [])]
        pairs = [pair for pair in zip(outputs, returned, strict=False) if pair[0].requires_grad]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
