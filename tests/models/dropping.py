"""Tiny models that drop in every way that transformers has: what the config of each says."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_TOKENS = dict(vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_SIZES = dict(
    **_TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
# By modules and attention's own; by functions of hidden states; within attention alone; on the residual alone.
KINDS = {
    "gpt2": dict(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": dict(**_SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "llama": dict(**_SIZES, attention_dropout=0.2),
    "phi3": dict(**_SIZES, resid_pdrop=0.2),
    "phi": dict(**_SIZES, resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1),
    "bloom": dict(**_SIZES, hidden_dropout=0.1, attention_dropout=0.1, n_head=4, n_layer=2),
    "falcon": dict(**_SIZES, hidden_dropout=0.1, attention_dropout=0.1),
    "gpt_neox": dict(**_SIZES, hidden_dropout=0.1, attention_dropout=0.1),
}


def build(kind, seed=0, **overrides):
    """A float32 model in training mode, with random weights."""
    config = AutoConfig.for_model(kind, **KINDS[kind], **overrides)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
