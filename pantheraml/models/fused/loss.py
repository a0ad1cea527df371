"""The loss of a model that is called with ``labels=``, from its logits, without a float32 copy of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from pantheraml.kernels.cross_entropy import IGNORE, cross_entropy
from pantheraml.kernels.launch import why_no_triton
from pantheraml.models.patching import PatchSet


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers' ``ForCausalLMLoss`` computes, with its arguments and meaning.

    Stock code makes (B, S, V) float32 logits, their log-softmax and its gradient beside the model's own; here only
    the gradient in the dtype of the logits is made.

    Args:
        logits: (B, S, V).
        labels: (B, S) int64, not shifted; not read when ``shift_labels`` is given.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by; None for the number of labels in this batch.
        ignore_index: the label that does not count.
        shift_labels: (B, S), shifted by the caller.
        kwargs: what else the model was called with; not read, as in transformers.

    Returns:
        A float32 number.
    """
    if ignore_index != IGNORE:
        given: Any = (labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)
        return ForCausalLMLoss(logits, *given, **kwargs)
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    total = cross_entropy(logits.reshape(-1, vocab_size), target).sum()
    count = (target != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def apply_loss(
    model: Any, patches: PatchSet, *, on_cpu: bool = False, device: torch.device | None = None
) -> PatchSet:
    """Give ``model`` (the base model) the fused loss where Triton kernels launch and its own is the causal one.

    Args:
        model: the base model.
        patches: the ledger.
        on_cpu: also on a CPU, where plain PyTorch computes it.
        device: where the model is going to be, if it is not there yet.

    Returns:
        ``patches``.
    """
    there: torch.device = device or next(model.parameters()).device
    reason = None if on_cpu and there.type == "cpu" else why_no_triton(there)
    if reason is None and getattr(model, "loss_function", None) is not ForCausalLMLoss:
        reason = "the model has a loss of its own"
    if reason is not None:
        patches.skip("loss", reason)
        return patches
    patches.set(model, "loss_function", causal_lm_loss, "the loss without a float32 copy of the logits")
    return patches
