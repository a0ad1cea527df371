"""What activations are estimated to take, against what layers of the reference shape were measured to keep."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from pantheraml.models.families import find_family
from pantheraml.models.patching import PatchSet
from pantheraml.models.recompute import estimate_activations
from pantheraml.training.rows import token_counts


@pytest.fixture(scope="module")
def model():
    """The 8B Llama without its weights."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def test_the_estimate_is_above_what_was_measured(model):
    """8,192 tokens: 60 GiB for stock layers, 23 GiB for fused ones (H200, peak less weights)."""
    stock = estimate_activations(model, 8192) / 2**30
    assert 60 < stock < 80
    apply_layers_on_meta(model)
    assert 22.5 < estimate_activations(model, 8192) / 2**30 < 25


def apply_layers_on_meta(model):
    from pantheraml.models.fused.decoder_layer import FusedDecoderLayer

    for index, layer in enumerate(list(model.model.layers)):
        new = FusedDecoderLayer(layer, find_family(model.config))
        PatchSet().replace(model, f"model.layers.{index}", new, "test")


def test_long_rows_do_not_overflow(model):
    rows = Dataset.from_dict({"input_ids": [[1] * 70_000, [1, 2]]})
    longest = int(token_counts(rows).max())
    assert longest == 70_000
    assert estimate_activations(model, token_counts(rows).max() * 64) > 2**40
