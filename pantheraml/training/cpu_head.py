"""The head of a language model in plain PyTorch, for TRL 1.15 on a CPU.

TRL's SFTTrainer gives the model a forward that answers ``fused_lm_head=True`` with log-probabilities per token.
TRL 1.15 computes them in Triton only, so without a GPU it cannot train at all; from 1.16 on it can. Here the same
figures come from the model's own logits.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from pantheraml.models.patching import PatchSet


def needs_cpu_head(device: torch.device) -> bool:
    """Whether the installed TRL cannot compute its head on ``device``."""
    return device.type == "cpu" and Version(trl.__version__) < Version("1.16")


def bind_cpu_head(model: PreTrainedModel, patches: PatchSet) -> None:
    """Give ``model`` (the base model, after TRL's trainer was built) a forward that needs no Triton."""
    patches.bind(model, "forward", _forward, "TRL 1.15 computes its head in Triton only")


def _forward(
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
