"""How many layers recompute: estimates against measurements, and plans against the memory that is free."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from pantheraml.models.families import find_family
from pantheraml.models.patching import PatchSet
from pantheraml.models.recompute_plan import (
    FREE_SHARE,
    RecomputePlan,
    kept_per_token,
    offload_plan,
    passing_bytes,
    plan_recompute,
    sizes_of,
)
from pantheraml.training.rows import token_counts

GIB = 2**30
TOKENS = 8192


def build():
    """The 8B Llama without its weights."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


@pytest.fixture(scope="module")
def fused():
    from pantheraml.models.fused.decoder_layer import FusedDecoderLayer

    model = build()
    for index, layer in enumerate(list(model.model.layers)):
        new = FusedDecoderLayer(layer, find_family(model.config))
        PatchSet().replace(model, f"model.layers.{index}", new, "test")
    return model


def test_the_estimate_is_what_was_measured(fused):
    """8,192 tokens: 23 GiB for fused layers, on an H200; 60 were there in all beside weights where norms, head and loss
    were those of transformers, too, which is 4 GiB of norms, and 7 or more of logits.
    """
    stock = replace(sizes_of(build()), rank=16)
    assert 49 < stock.kept.all * 32 * TOKENS / GIB < 50
    assert kept_per_token(fused) == (92 * 1024 + 128, 36 * 1024 + 128, 16 * 1024 + 128, 8 * 1024)
    # With adapters, t of four stacks in 64 columns each.
    assert replace(sizes_of(fused), rank=16).kept.all == 92 * 1024 + 128 + 2 * 4 * 64


def test_masters_are_computed_by_stock_layers_under_autocast(fused):
    """Norms and sums in float32, a 16-bit copy for each of five linears; of one dtype, trained layers are fused."""
    frozen = sizes_of(fused)
    in_16_bits = replace(frozen, compute=2, rank=0, is_trained=True)
    assert in_16_bits.kept == replace(frozen, rank=0).kept and in_16_bits.computes_fused
    numbers = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    assert in_16_bits.layer_passing(1) - frozen.layer_passing(1) == pytest.approx(2 * numbers, rel=0.001)
    tiled = [sizes.layer_passing(65536, recomputes=True) for sizes in (in_16_bits, frozen)]
    assert 0 < tiled[0] - tiled[1] <= (2 + 4) * numbers
    trained = replace(frozen, size=4, compute=2, rank=0, is_trained=True).kept
    hidden, queries, keys, inner = 4096, 4096, 1024, 14336
    assert trained.all == 18 * hidden + 4 * queries + 4 * keys + 8 * inner + 4 * 32
    assert trained.attended == trained.input == 4 * hidden


def test_plenty_of_memory_recomputes_nothing(fused):
    plan = plan_recompute(fused, TOKENS, 120 * GIB)
    assert (plan.layers, plan.stored) == (0, 0)
    assert "no layer recomputes (8192 tokens at a time: 23.0 of 120.0 GiB free)" in plan.describe(32)


@pytest.mark.parametrize("free", [26, 22, 18, 15])
def test_as_few_layers_as_possible_recompute(fused, free):
    plan = plan_recompute(fused, TOKENS, free * GIB)
    room = FREE_SHARE * free * GIB - passing_bytes(fused, TOKENS)
    whole, _, attended, _ = (TOKENS * size for size in kept_per_token(fused))
    assert 0 < plan.layers < 32 and plan.keep == "attended" and plan.stored == 0
    assert plan.layers * attended + (32 - plan.layers) * whole == plan.need <= room
    fewer = plan.layers - 1
    assert fewer * attended + (32 - fewer) * whole > room


def test_then_the_host_takes_what_does_not_fit(fused):
    tight = int((passing_bytes(fused, TOKENS) + 2 * GIB) / FREE_SHARE)
    plan = plan_recompute(fused, TOKENS, tight, 64 * GIB)
    assert plan.layers == 32 and plan.keep == "attended" and 3 < plan.stored <= 32
    size = TOKENS * kept_per_token(fused).attended
    assert plan.need <= 2 * GIB and plan.host == plan.stored * size
    assert plan.need == (32 - plan.stored + 3) * size  # three layers' are on their way
    without_host = plan_recompute(fused, TOKENS, tight)
    assert (without_host.keep, without_host.stored, without_host.layers) == ("input", 0, 32)


def test_when_nothing_fits_the_least_is_tried(fused):
    assert plan_recompute(fused, TOKENS, GIB) == RecomputePlan(
        TOKENS, 32, "input", 0, 32 * TOKENS * 8192, GIB
    )


def test_400_thousand_tokens_fit_with_the_host(fused):
    """NF4 weights leave about 132 GiB on an H200; the machine has 120 GiB of host memory free."""
    plan = plan_recompute(fused, 400_000, 132 * GIB, 120 * GIB)
    assert plan.stored > 0 and plan.need + passing_bytes(fused, 400_000) <= 132 * GIB
    assert plan.host <= 120 * GIB


@pytest.mark.parametrize(
    ("host", "keep", "stored"), [(64, "projected", 9.0), (8, "attended", 4.0), (4, "input", 2.0)]
)
def test_offload_moves_all_layers(fused, host, keep, stored):
    plan = offload_plan(fused, TOKENS, host * GIB)
    assert (plan.layers, plan.stored, plan.keep) == (32, 32, keep)
    assert f"32 keep {stored} GiB in host memory" in plan.describe(32) and "GiB stay" in plan.describe(32)


def test_what_is_on_its_way_to_the_host_is_small_beside_the_model(fused):
    """q, k and v stay behind where three layers' would be more than a twelfth of the model, 15 GiB."""
    assert [offload_plan(fused, tokens, 900 * GIB).keep for tokens in (8192, 11_000, 12_500, 100_000)] == [
        "projected", "projected", "attended", "attended",
    ]  # fmt: skip


def test_offloading_computes_in_tiles_that_are_small_beside_the_model(fused):
    """8,192 tokens of 4 times 14,336 values in 16 bits are 0.9 GiB, the model is 15."""
    assert offload_plan(fused, TOKENS, 64 * GIB).tile == 8192
    with torch.device("meta"):
        tiny = LlamaForCausalLM(
            LlamaConfig(vocab_size=128, hidden_size=256, intermediate_size=8192, num_hidden_layers=1)
        )
    assert offload_plan(tiny, TOKENS, 64 * GIB).tile == 1024
    assert plan_recompute(fused, TOKENS, 26 * GIB).tile == 0


def test_long_rows_do_not_overflow(fused):
    rows = Dataset.from_dict({"input_ids": [[1] * 70_000, [1, 2]]})
    longest = int(token_counts(rows).max())
    assert longest == 70_000
    assert kept_per_token(fused).all * longest * 64 * 32 > 2**40
