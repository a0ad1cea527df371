"""The operators of experts on CPU: their plain paths, their gradients and their registration."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import expert_activation, expert_routing, grouped_gemm, grouped_outer
from pantheraml.kernels.expert_groups import Groups
from tests.kernels.expert_cases import (
    COUNTS,
    GATES,
    check_activation,
    check_outer,
    check_rows,
    make_activation,
    make_groups,
    make_rows,
)
from tests.references import experts as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(), dict(indexed=True, bias=True, rank=3, stored="kn")])
def test_products(counts, dtype, options):
    arguments = make_rows(COUNTS[counts], 33, 20, dtype, **options)
    check_rows(grouped_gemm.grouped_rows(**arguments, scale=2.0), arguments, scale=2.0)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_outer_products(counts, dtype):
    groups = make_groups(COUNTS[counts])
    torch.manual_seed(0)
    left, right = torch.randn(groups.num_rows, 5).to(dtype), torch.randn(groups.num_rows, 9).to(dtype)
    check_outer(grouped_outer.grouped_outer(left, right, groups.ends), left, right, groups.ends)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(gate, dtype):
    gate = GATES[gate]
    gu, dv, w = make_activation(75, 133, dtype, gate)
    back = expert_activation.activate_back(dv, gu, w, gate, with_value=True)
    check_activation(expert_activation.activate(gu, gate), back, (gu, dv, w), gate)
    assert expert_activation.activate_back(dv, gu, w, gate, with_value=False)[2] is None


@pytest.mark.parametrize(("experts", "choices", "tokens"), [(5, 3, 40), (300, 2, 7), (4, 1, 1), (2, 2, 3)])
def test_sorting_and_summing_back(experts, choices, tokens):
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])
    routes = expert_routing.sort_by_expert(index, experts)
    flat = index.reshape(-1)
    assert torch.equal(flat[routes.order], flat.sort(stable=True)[0])
    assert torch.equal(routes.groups.ends.long(), torch.bincount(flat, minlength=experts).cumsum(0))
    assert routes.groups.ends.dtype is torch.int32
    assert torch.equal(routes.order[routes.place.reshape(-1)], torch.arange(flat.numel()))
    assert torch.equal(routes.tokens.long(), routes.order // choices)
    x, weights = torch.randn(tokens, 6), torch.rand(tokens, choices)
    there_and_back = expert_routing.sum_choices(x[routes.tokens.long()], routes.place, weights)
    torch.testing.assert_close(there_and_back, x * weights.sum(1, keepdim=True))


def test_gradients_of_the_public_product():
    groups = make_groups(COUNTS["uneven"])
    x = torch.randn(23, 6, requires_grad=True)
    w = torch.randn(4, 5, 6, requires_grad=True)
    dy = torch.randn(23, 5)
    y = grouped_gemm.grouped_mm(x, w, groups.ends)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch.autograd.grad(reference.rows(*exact, groups.ends), exact, dy.double())
    for ours, theirs in zip((dx, dw), truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert not dw[1].any()


def test_opcheck():
    groups = make_groups(COUNTS["uneven"])
    x, w = torch.randn(23, 6, requires_grad=True), torch.randn(4, 5, 6, requires_grad=True)
    check, ops = torch.library.opcheck, torch.ops.pantheraml
    check(ops.grouped_mm, (x, w, groups.ends))
    check(ops.grouped_mm, (x.detach(), w.detach().mT.contiguous().mT, groups.ends))
    check(ops.grouped_outer, (x.detach(), torch.randn(23, 3), groups.ends))
    routes = expert_routing.sort_by_expert(torch.tensor([[0, 1], [3, 0]]), 4)
    check(ops.sum_choices, (torch.randn(4, 6), routes.place, torch.rand(2, 2)))
    check(ops.sum_choices, (torch.randn(4, 6), routes.place, None))
    check(ops.expert_activation, (torch.randn(4, 6), True, True, 1.7, 1.0))


def test_wrong_numbers_are_refused():
    arguments = make_rows(COUNTS["uneven"], 33, 64, torch.bfloat16, rank=4)
    right = grouped_gemm.grouped_rows(**arguments)
    late = Groups(arguments["groups"].ends - torch.tensor([0, 0, 1, 0], dtype=torch.int32), 23)
    for wrong in (right * 1.05, grouped_gemm.grouped_rows(**{**arguments, "groups": late})):
        with pytest.raises(AssertionError, match="output"):
            check_rows(wrong, arguments)


def test_tiles_follow_rows_and_memory(monkeypatch):
    blocks = [make_groups([rows, rows]).block for rows in (200, 60, 30, 3)]
    assert blocks == [128, 64, 32, 16]
    device = torch.device("cpu")
    assert grouped_gemm.tile_of(128, 4096, torch.bfloat16, device)["BLOCK_N"] == 256
    assert grouped_gemm.tile_of(128, 20, torch.bfloat16, device)["BLOCK_N"] == 32
    monkeypatch.setattr(grouped_gemm, "_shared_memory", lambda _: 101_376)
    narrow = grouped_gemm.tile_of(128, 4096, torch.bfloat16, device)
    bytes_needed = 2 * narrow["BLOCK_K"] * (narrow["BLOCK_M"] + narrow["BLOCK_N"]) * narrow["num_stages"]
    assert bytes_needed <= 101_376


def test_torch_s_kernel_is_not_asked_for_without_a_gpu():
    assert "sm_90" in grouped_gemm.why_no_torch_grouped(torch.device("cpu"))
