"""The fused decoder layer in bf16 on a GPU: at most twice the error of the stock layer, against float32."""

from __future__ import annotations

import pytest
import torch

from tests.fused.test_decoder_layer import ALL, FAMILIES, build, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_errs_at_most_twice_as_much_as_stock(family, targets):
    exact, _ = build(family, targets, False)
    logits, gradients = run(exact)
    ours, stock = (run(build(family, targets, fused)[0].to(torch.bfloat16)) for fused in (True, False))
    norm = torch.linalg.vector_norm

    def error(value, truth):
        return float(norm(value.float() - truth) / norm(truth))

    assert error(ours[0], logits) <= 2 * error(stock[0], logits)
    for name, truth in gradients.items():
        assert error(ours[1][name], truth) <= 2 * error(stock[1][name], truth), name
        assert error(ours[1][name], truth) < 0.2, name
