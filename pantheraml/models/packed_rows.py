"""Packed documents must not see one another.

TRL packs rows and flattens padding-free batches into one sequence whose position ids restart with every
document. Most models derive from that which tokens may attend to which; some build their masks without
the positions. Which of the two a model is, is tried and not guessed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from pantheraml.errors import ConfigError
from pantheraml.log import say_once
from pantheraml.models.sharding import let_go

_PROBE = 8  # tokens of each document of the probe


def keep_documents_apart(model: PreTrainedModel | PeftModel) -> None:
    """Make the model keep the documents of packed and padding-free batches apart.

    Runs the model on sixteen tokens. Where documents mix, its backbone is given attention masks made from
    the position ids; nothing else of the model changes.

    Args:
        model: a causal language model on its device, before it is wrapped for several ranks.

    Raises:
        ConfigError: documents mix all the same, for example through a recurrent state.
    """
    if not documents_mix(model):
        return
    causal = _without_adapter(model)
    handle = causal.base_model.register_forward_pre_hook(_mask_by_positions, with_kwargs=True)
    if documents_mix(model):
        handle.remove()
        raise ConfigError(
            got=f"Documents packed into one row see one another in a {causal.config.model_type} model with "
            f"{causal.config._attn_implementation} attention.",
            need="Each document must be trained as if it were alone.",
            fix="Set packing=False and padding_free=False, or load the model with "
            "attn_implementation='flash_attention_2'.",
        )
    say_once(f"Packed documents of this {causal.config.model_type} model are kept apart by explicit masks.")


def _without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@torch.no_grad()
def documents_mix(model: PreTrainedModel | PeftModel) -> bool:
    """Whether what the model says about a document depends on the one packed before it."""
    causal = _without_adapter(model)
    device = cast(torch.Tensor, causal.get_input_embeddings().weight).device
    vocabulary = causal.config.get_text_config().vocab_size
    tokens = torch.arange(3 * _PROBE, device=device).view(3, _PROBE) * 7 % vocabulary
    positions = torch.arange(_PROBE, device=device).repeat(2)[None]
    was_training = model.training
    model.eval()
    try:
        first, second = (
            model(
                input_ids=torch.cat([before, tokens[2]])[None], position_ids=positions, use_cache=False
            ).logits
            for before in tokens[:2]
        )
    finally:
        model.train(was_training)
        let_go(causal)
    answers = first[:, _PROBE:].float()
    # Rounding differs by far less than this where only the neighbours' values, not the shapes, differ.
    return bool((answers - second[:, _PROBE:].float()).abs().max() > 0.02 * answers.std())


def _mask_by_positions(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: the masks of a batch whose documents are told by position ids alone."""
    positions = kwargs.get("position_ids")
    if (
        positions is None
        or kwargs.get("attention_mask") is not None
        or kwargs.get("past_key_values") is not None
    ):
        return None
    # Only the shape, type and device of the embeddings are read.
    embeddings = torch.empty((*positions.shape, 0), dtype=backbone.dtype, device=positions.device)
    masks = create_masks_for_generate(
        config=backbone.config,
        inputs_embeds=embeddings,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    return args, {**kwargs, "attention_mask": masks}
