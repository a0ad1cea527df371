"""The head of a language model during supervised training: log-probabilities per token, without the logits.

TRL's SFTTrainer gives the model a forward that answers ``fused_lm_head=True`` with a ``FusedCausalLMOutput``. Ours
takes that place where it covers the model: it makes the gradient of a frozen head in the forward (two products with
the head instead of TRL's three), sums that of a trained one in float32, tells the routers' loss of each micro-batch,
and asks the device nothing that the batch says. On a CPU it needs no Triton, which that of TRL 1.15 does.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import trl
from packaging.version import Version
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from pantheraml.kernels.linear_cross_entropy import TokenScores, linear_log_probs
from pantheraml.models.fused.known_rows import known_rows
from pantheraml.models.patching import PatchSet
from pantheraml.training.router_balance import Groups, balance_loss, experts_per_token, router_sums

# What a config may multiply its logits by, before a soft-cap; Granite divides by its logits_scaling instead.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)


def needs_cpu_head(device: torch.device) -> bool:
    """Whether the installed TRL cannot compute its head on ``device``: 1.15 does it in Triton only."""
    return device.type == "cpu" and Version(trl.__version__) < Version("1.16")


def why_not_fused(model: PreTrainedModel) -> str | None:
    """Why the head of ``model`` cannot be fused with its loss, or None when it can."""
    config: Any = model.config.get_text_config()
    if _read_weight(model) is None:
        return "the head is no plain matrix"
    if getattr(config, "output_router_logits", False) and experts_per_token(config) is None:
        return "the model adds a loss of its own"
    if read_scale(config) is None:
        return "the logits are scaled in a way of their own"
    return None


def read_scale(config: Any) -> float | None:
    """What ``config``, that of the text part, multiplies the logits by; None where that is no plain number."""
    found = [getattr(config, name, None) for name in _MULTIPLIERS]
    scale = next((value for value in found if value is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type in _MULTIPLY_BY_LOGITS_SCALING else 1 / divisor
    if scale is None:
        return 1.0
    return float(scale) if isinstance(scale, int | float) else None


def _read_weight(model: PreTrainedModel) -> Tensor | None:
    """The matrix (V, H) of the head, None if there is more to the head: a bias, an adapter, packed numbers."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # a head that is trained beside an adapter
        active = head.active_adapters
        if head.disable_adapters or len(active) != 1 or active[0] not in head.modules_to_save:
            head = head.original_module
        else:
            head = head.modules_to_save[active[0]]
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return None
    return head.weight if head.weight.is_floating_point() else None


def bind_head(model: PreTrainedModel, patches: PatchSet, temperature: float = 1.0) -> None:
    """Put our head into ``model`` (the base model, after TRL's trainer was built).

    What it does not cover at a call goes to the forward that was there before.

    Args:
        model: ``why_not_fused`` and ``why_not_tempered`` tell which are covered.
        patches: the ledger.
        temperature: what logits are divided by.
    """
    patches.bind(model, "forward", partial(_forward, model.forward, temperature), "the loss without logits")


def why_not_tempered(model: PreTrainedModel, temperature: float) -> str | None:
    """Why our head does not divide the logits of ``model`` by ``temperature``, or None when it does."""
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return None if softcap is None or temperature == 1 else "the logits are capped before"


def bind_cpu_head(model: PreTrainedModel, patches: PatchSet, temperature: float = 1.0) -> None:
    """Put a head in plain PyTorch into ``model``, for a TRL that cannot compute its own here."""
    forward = partial(_plain_forward, temperature)
    patches.bind(model, "forward", forward, "TRL 1.15 computes its head in Triton only")


def _forward(
    before: Any,
    temperature: float,
    model: PreTrainedModel,
    *args: Any,
    fused_lm_head: bool = False,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    index = kwargs.pop("label_index", None)
    if not fused_lm_head or labels is None or "shift_labels" in kwargs or why_not_fused(model) is not None:
        return before(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
    num_items, groups = kwargs.pop("num_items_in_batch", None), kwargs.pop("router_groups", None)
    target = labels[:, 1:]
    mask = target != -100
    if index is None:  # asked before the model runs, so that the answer waits for no layer
        index = mask.reshape(-1).nonzero()[:, 0]
    backbone: Any = model.base_model
    inputs = {**kwargs, "use_cache": False}
    # Arguments by place are not looked at: they may be a mask, or positions.
    with nullcontext() if len(args) > 1 else known_rows(backbone, inputs, labels):
        output = backbone(*args, **inputs)
    hidden = output.last_hidden_state[:, :-1]
    # The last layers of a split model may be on another device than the labels.
    there = hidden.device
    rows, tokens = hidden.reshape(-1, hidden.shape[-1])[index.to(there)], target.reshape(-1)[index].to(there)
    scores = score(model, rows, tokens, temperature)
    zeros = torch.zeros(mask.numel(), device=mask.device)
    log_probs, entropy, is_top1 = (
        zeros.index_put((index,), values.to(mask.device)).view(mask.shape) for values in scores
    )
    log_probs = log_probs.clone()  # FSDP2 hooks onto what a model gives back, which is to be no view
    # A batch without labels still has to reach every parameter.
    if index.numel() == 0:
        log_probs = log_probs + 0.0 * hidden.sum().to(mask.device)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    balance = _balance(model, output, kwargs.get("attention_mask"), groups)
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=None if balance is None else balance.to(mask.device),
    )


def _balance(
    model: PreTrainedModel, output: Any, mask: Tensor | None, groups: Groups | None
) -> Tensor | None:
    """The routers' loss, of each micro-batch where there are ``groups``; None where no router tells its logits."""
    logits = getattr(output, "router_logits", None)
    top_k = experts_per_token(model.config.get_text_config())
    if not logits or top_k is None:
        return None
    found = balance_loss(router_sums(logits, top_k, mask, groups))
    return found[0] if groups is None else found


def score(model: PreTrainedModel, rows: Tensor, labels: Tensor, temperature: float = 1.0) -> TokenScores:
    """The head of ``model`` on labelled rows (T, H), in the dtype that autocast, if on, computes products in."""
    weight, config = _read_weight(model), model.config.get_text_config()
    scale, cap = read_scale(config), getattr(config, "final_logit_softcapping", None)
    assert weight is not None and scale is not None
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return linear_log_probs(rows, weight, labels, scale=scale / temperature, softcap=cap, dtype=dtype)


def _plain_forward(
    temperature: float,
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
    log_p = (output.logits[:, :-1].float() / temperature).log_softmax(-1)
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
