"""The loss of routers, against transformers' own and TRL's trainer."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pantheraml.models.patching import PatchSet
from pantheraml.training.head import bind_head
from pantheraml.training.router_balance import Groups, balance_loss, router_sums
from tests import tiny
from tests.training.test_merging import train  # noqa: F401

EXPERTS, TOP_K, TOKENS = 6, 2, 20
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def logits(layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(TOKENS, EXPERTS, generator=generator).requires_grad_() for _ in range(layers))


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_transformers(masked):
    leaves = logits()
    mask = (torch.arange(TOKENS).view(4, 5) % 5 < 3).long() if masked else None
    want = load_balancing_loss_func(leaves, EXPERTS, TOP_K, mask)
    found = balance_loss(router_sums(leaves, TOP_K, mask))
    assert found.shape == (1,)
    torch.testing.assert_close(found[0], want)
    for mine, theirs in zip(gradients(found.sum(), leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_sums_of_layers_and_of_micro_batches():
    leaves = logits(4)
    index = torch.tensor([0] * 6 + [1] * 9 + [3] * 5)
    groups = Groups(index=index, labelled=torch.ones(4), count=4)
    whole = router_sums(leaves, TOP_K, groups=groups)
    parts = [router_sums(part, TOP_K, groups=groups) for part in (leaves[:1], leaves[1:])]
    torch.testing.assert_close(sum(parts), whole)
    found = balance_loss(whole)
    for group in (0, 1, 3):
        alone = tuple(layer[index == group] for layer in leaves)
        torch.testing.assert_close(found[group], load_balancing_loss_func(alone, EXPERTS, TOP_K))
    assert found[2] == 0


@pytest.mark.parametrize("family", MIXTURES)
def test_the_head_gives_the_models_own(family):
    model = tiny.build_model(family, output_router_logits=True)
    ids = torch.arange(5, 29).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    want = model(ids, attention_mask=mask, labels=ids).aux_loss
    patches = PatchSet()
    bind_head(model, patches)
    given = dict(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(model(**given).aux_loss, want)
    one_each = Groups(index=torch.tensor([0, 1]).repeat_interleave(12), labelled=torch.ones(2), count=2)
    assert model(**given, router_groups=one_each).aux_loss.shape == (2,)
    patches.revert()


@pytest.mark.parametrize("family", MIXTURES)
def test_training_gives_the_numbers_of_trls_head(train, family):  # noqa: F811
    """Also where the micro-batches of a step go through the model together."""
    settings = dict(router_aux_loss_coef=0.5)
    trl, padded, theirs = train(family, load=dict(kernels="off"), merge_micro_batches=False, **settings)
    assert trl.aux_loss_enabled and not trl._has_own_head
    _, apart, alone = train(family, merge_micro_batches=False, **settings)
    ours, passes, merged = train(family, merge_micro_batches=True, **settings)
    assert len(padded) == len(apart) == 12 and len(passes) == 4
    assert alone == [pytest.approx(pair, rel=1e-5, abs=1e-6) for pair in theirs]
    assert merged == [pytest.approx(pair, rel=1e-5, abs=1e-6) for pair in theirs]
    losses = [[e["aux_loss"] for e in one.state.log_history if "aux_loss" in e] for one in (ours, trl)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and min(losses[0]) > 0
    _, _, without = train(family, merge_micro_batches=True, router_aux_loss_coef=0.0)
    assert abs(without[0][0] - merged[0][0]) > 1e-2, "it is a part of the loss"
