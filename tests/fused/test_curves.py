"""32 training steps with kernels on and off give the same losses, step by step, for every family with a gated MLP."""

from __future__ import annotations

import pytest
import torch

from tests.fused.test_decoder_layer import ALL, DEVICE, build
from tests.fused.test_whole_layer import DENSE, build_whole

STEPS = 32


def curve(model):
    """Losses of ``STEPS`` steps of AdamW over four batches."""
    generator = torch.Generator().manual_seed(7)
    batches = torch.randint(5, 400, (4, 2, 24), generator=generator).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(STEPS):
        ids = batches[step % 4]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("keep", ["all", "attended"])
@pytest.mark.parametrize("family", DENSE)
def test_the_same_curve(family, keep):
    stock = curve(build(family, ALL, False)[0].train())
    ours = curve(build_whole(family, keep)[0])
    assert stock[-1] < 0.99 * stock[0]
    # Rounding grows with every step: Adam divides small gradients by their own size. At more than twice this rate the
    # curves of some families part after some fifteen steps.
    for step, (mine, theirs) in enumerate(zip(ours, stock, strict=True)):
        assert abs(mine - theirs) <= 1e-5 * theirs, f"step {step}: {mine} against {theirs}"
