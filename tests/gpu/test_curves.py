"""32 steps in bf16 with kernels on and off: the curves lie no further apart than those of two seeds of stock."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel
from tests import tiny
from tests.fused.test_curves import curve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def losses(folder, kernels, seed):
    # Some versions start Gemma 2 with an attention that leaves its soft-cap out.
    eager = dict(attn_implementation="eager") if kernels == "off" else {}
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_16bit=True, kernels=kernels, **eager
    )
    model = FastLanguageModel.get_peft_model(model, r=4, random_state=seed)
    return curve(FastLanguageModel.for_training(model))


def distance(one, other):
    """The mean distance of two curves, step by step."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_curve_in_bf16(checkpoints, family):
    folder = checkpoints(family)
    stock, other = (losses(folder, "off", seed) for seed in (1, 2))
    ours = losses(folder, "auto", 1)
    assert stock[-1] < stock[0]
    apart = distance(ours, stock)
    assert apart <= distance(stock, other), (
        f"{apart} from stock, whose seeds are {distance(stock, other)} apart"
    )
