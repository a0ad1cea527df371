"""The losses' Triton kernels under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import cross_entropy as op
from pantheraml.kernels import linear_cross_entropy as head_op
from pantheraml.kernels.launch import runs_triton
from tests.kernels.loss_cases import BENDS, IGNORE, check_head, check_loss, make_head, make_logits
from tests.kernels.test_cross_entropy import run
from tests.kernels.test_linear_cross_entropy import run as run_head
from tests.references import cross_entropy as reference

CASES = [
    *((1, 11, "contiguous", *bend) for bend in BENDS),
    *((7, 600, "sliced", *bend) for bend in BENDS),
    (5, 300, "transposed", 2.0, 5.0),
    (9, 1, "contiguous", 2.0, 5.0),
]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(op, "_BLOCKS", {"BLOCK": 256})


def test_the_interpreter_runs():
    assert runs_triton(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary", "layout", "scale", "cap"), CASES)
def test_loss_and_gradient(rows, vocabulary, layout, dtype, scale, cap):
    cases = [
        make_logits(rows, vocabulary, dtype, layout=layout, seed=seed)
        for seed in range(24 if rows == 1 else 2)
    ]
    check_loss(run, cases, scale, cap)


@pytest.mark.parametrize(("scale", "cap"), BENDS)
@pytest.mark.parametrize(("dtype", "trained"), [(torch.float32, True), (torch.float16, False)])
def test_fused_head(dtype, scale, cap, trained, monkeypatch):
    """Products of a trained head are PyTorch's; ``test_linear_cross_entropy.py`` has them in every dtype."""
    monkeypatch.setattr(head_op, "_CHUNK_ELEMENTS", 8 * 300)
    cases = [make_head(20, 16, 300, dtype, seed=seed) for seed in range(2)]
    check_head(run_head, cases, scale, cap, trained)


@pytest.mark.parametrize(("scale", "cap"), BENDS)
def test_figures(scale, cap):
    z, labels, _ = make_logits(20, 300)
    scores = op.score_rows(z, labels, scale, cap)
    log_probs, entropy, is_top1 = reference.scores(z, labels, scale, cap)
    for ours, exact in ((scores.log_probs, log_probs), (scores.entropy, entropy)):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-6, atol=2e-6)
    assert torch.equal(scores.is_top1, is_top1.float())


def test_bfloat16_by_one_unit():
    # the interpreter cuts float32 off where the GPU rounds it to bfloat16
    z, labels, g = make_logits(9, 300, torch.bfloat16)
    exact = run(z.float(), labels, g, 0.5, 3.0)
    for got, want in zip(run(z, labels, g, 0.5, 3.0), exact, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("blocked", [slice(0, 256), slice(100, 300)])
def test_forbidden_tokens(blocked):
    z, labels, g = make_logits(6, 300)
    z[:, blocked] = -torch.inf
    labels = torch.where(labels == IGNORE, IGNORE, 290 if blocked.start == 0 else 5)
    check_loss(run, [(z, labels, g)], 1.0, None)
    figures = op.score_rows(z, labels, 1.0, None)
    exact = reference.scores(z, labels)
    torch.testing.assert_close(figures.entropy, exact[1].float(), rtol=1e-6, atol=2e-6)


def test_a_label_that_is_no_token_is_not_read():
    z, labels, g = make_logits(4, 300)
    labels[:] = torch.tensor([5, 300, -7, 2**40])
    loss, _ = run(z, labels, g)
    assert loss.isnan().tolist() == [False, True, True, True]


def test_offsets_past_2_to_the_31():
    # Rows 2^30 elements apart, so the last one starts at 2^31, in memory that is mostly never touched.
    values, labels, g = make_logits(3, 300, torch.float16)
    z = torch.empty(2**31 + 300, dtype=torch.float16).as_strided((3, 300), (2**30, 1))
    z.copy_(values)
    for got, want in zip(run(z, labels, g), run(values, labels, g), strict=True):
        assert torch.equal(got, want)
    far = op.score_rows(z, labels, 1.0, None, gradient=True)
    near = op.score_rows(values, labels, 1.0, None, gradient=True)
    assert torch.equal(z, values) and all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def test_a_wrong_kernel_is_seen():
    def wrong(z, labels, g, scale, cap):
        loss, dz = run(z, labels, g, scale, cap)
        return loss, dz * (1 + 1e-5)

    with pytest.raises(AssertionError, match="dz"):
        check_loss(wrong, [make_logits(7, 300)], 1.0, None)
