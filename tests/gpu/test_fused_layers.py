"""The fused decoder layer in bf16 on a GPU: at most twice the error of the stock layer, against float32."""

from __future__ import annotations

import pytest
import torch

from tests.fused.test_decoder_layer import ALL, FAMILIES, MIXTURES, build, names_in, run

pytestmark = pytest.mark.gpu


SEEDS = range(4)


def squared_errors(model, exact):
    """Per tensor, the sum over batches of its squared error against ``exact``, and of its squared size."""
    sums = {}
    for seed in SEEDS:
        logits, gradients = run(model, seed=seed)
        for name, value in {"logits": logits, **gradients}.items():
            truth = exact[seed][name]
            error, size = sums.get(name, (0.0, 0.0))
            error += float((value.double() - truth).square().sum())
            sums[name] = (error, size + float(truth.square().sum()))
    return sums


@pytest.mark.promise("F3")
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_errs_at_most_twice_as_much_as_stock(family, targets):
    if not names_in(family, targets):
        pytest.skip("this family has experts in the place of these linears")
    model, _ = build(family, targets, False)
    exact = []
    # torch's grouped products take no float64.
    model = model if family in MIXTURES else model.double()
    for seed in SEEDS:
        logits, gradients = run(model, seed=seed)
        exact.append({"logits": logits, **{name: value.clone() for name, value in gradients.items()}})
    ours, stock = (
        squared_errors(build(family, targets, fused)[0].to(torch.bfloat16), exact) for fused in (True, False)
    )
    for name, (error, size) in ours.items():
        assert error <= 4 * stock[name][0], name
        # A token that goes to another expert in bf16 moves the gradients of mixtures by more.
        assert error < (0.5 if family in MIXTURES else 0.2) ** 2 * size, name
