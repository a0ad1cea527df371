"""The head of a language model during supervised training: log-probabilities per token, without the logits.

TRL's SFTTrainer gives the model a forward that answers ``fused_lm_head=True`` with a ``FusedCausalLMOutput``. Ours
takes that place where it is better: on a GPU with a frozen head it makes the gradient in the forward (two products
with the head instead of TRL's three), and with TRL 1.15 on a CPU it needs no Triton, which TRL's own does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from pantheraml.kernels.linear_cross_entropy import linear_log_probs
from pantheraml.models.fused.projection import computes_in
from pantheraml.models.patching import PatchSet

# What a config may do to its logits besides a soft-cap; such a head is left to TRL.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def needs_cpu_head(device: torch.device) -> bool:
    """Whether the installed TRL cannot compute its head on ``device``: 1.15 does it in Triton only."""
    return device.type == "cpu" and Version(trl.__version__) < Version("1.16")


def why_not_fused(model: PreTrainedModel) -> str | None:
    """Why the head of ``model`` cannot be fused with its loss, or None when it can."""
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return "the head is no plain matrix"
    if head.weight.requires_grad:
        return "the head is trained"
    if getattr(config, "output_router_logits", False):
        return "the model adds a loss of its own"
    if any(getattr(config, name, None) not in (None, 1.0) for name in _SCALES):
        return "the logits are scaled"
    return None


def bind_head(model: PreTrainedModel, patches: PatchSet) -> None:
    """Put our head into ``model`` (the base model, after TRL's trainer was built).

    What it does not cover at a call goes to the forward that was there before.
    """
    patches.bind(model, "forward", partial(_forward, model.forward), "the loss without logits")


def bind_cpu_head(model: PreTrainedModel, patches: PatchSet) -> None:
    """Put a head in plain PyTorch into ``model``, for a TRL that cannot compute its own here."""
    patches.bind(model, "forward", _plain_forward, "TRL 1.15 computes its head in Triton only")


def _fits(model: PreTrainedModel) -> bool:
    weight: Any = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    return why_not_fused(model) is None and computes_in(weight.dtype, weight.device)


def _forward(
    before: Any,
    model: PreTrainedModel,
    *args: Any,
    fused_lm_head: bool = False,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if not fused_lm_head or labels is None or "shift_labels" in kwargs or not _fits(model):
        return before(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
    num_items = kwargs.pop("num_items_in_batch", None)
    target = labels[:, 1:]
    mask = target != -100
    # Which rows are labelled is asked before the model runs, so that the answer waits for no layer.
    index = mask.reshape(-1).nonzero()[:, 0]
    backbone: Any = model.base_model
    hidden = backbone(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
    head: Any = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    rows = hidden.reshape(-1, hidden.shape[-1])[index]
    scores = linear_log_probs(rows, head.weight, target.reshape(-1)[index], softcap=cap)
    zeros = rows.new_zeros(mask.numel(), dtype=torch.float32)
    log_probs, entropy, is_top1 = (zeros.index_put((index,), score).view(mask.shape) for score in scores)
    # A batch without labels still has to reach every parameter.
    if index.numel() == 0:
        log_probs = log_probs + 0.0 * hidden.sum()
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, aux_loss=None
    )


def _plain_forward(
    model: PreTrainedModel,
    *args: Any,
    fused_lm_head: bool = False,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    own_forward = type(model).forward
    if not fused_lm_head or labels is None:
        return own_forward(model, *args, labels=labels, **kwargs)
    num_items = kwargs.pop("num_items_in_batch", None)
    output = own_forward(model, *args, **kwargs)
    target = labels[:, 1:]
    mask = target != -100
    log_p = output.logits[:, :-1].float().log_softmax(-1)
    log_probs = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0] * mask
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1) * mask
        is_top1 = (log_p.argmax(-1) == target) & mask
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=getattr(output, "aux_loss", None),
    )
