"""Mixtures of experts on a GPU: kernels against float64, blocks against transformers and PEFT."""

from __future__ import annotations

import warnings

import pytest
import torch

from pantheraml.kernels import expert_activation, expert_routing, grouped_gemm, grouped_outer
from pantheraml.kernels.expert_groups import Groups
from pantheraml.models.families import find_family
from pantheraml.models.fused.experts import ExpertsFunction, apply_experts
from pantheraml.models.patching import PatchSet
from tests.fused.test_experts import BOTH, FAMILIES, ROUTER, build
from tests.kernels.expert_cases import (
    COUNTS,
    GATES,
    check_activation,
    check_outer,
    check_rows,
    judge_rows,
    make_activation,
    make_groups,
    make_rows,
)
from tests.kernels.loss_cases import check_all

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = {**COUNTS, "large": [200, 0, 333, 1, 128], "128 experts": list(range(128))}
# N, K, options
PRODUCTS = [
    (384, 256, dict()),
    (33, 70, dict(indexed=True)),
    (384, 256, dict(bias=True, rank=16)),
    (264, 70, dict(indexed=True, bias=True, rank=3, stored="kn")),
    (16, 512, dict(rank=100)),
]


@pytest.mark.parametrize("counts", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "options"), PRODUCTS)
def test_products(counts, dtype, n, k, options):
    several = 20 if sum(CASES[counts]) * n < 1000 else 1
    cases = [
        make_rows(CASES[counts], n, k, dtype, device="cuda", seed=seed, **options) for seed in range(several)
    ]
    judged = [judge_rows(grouped_gemm.triton_rows(**case, scale=0.5), case, scale=0.5) for case in cases]
    check_all(("output",), judged)


@pytest.mark.parametrize("options", [options for *_, options in PRODUCTS])
def test_products_by_torch(options):
    reason = grouped_gemm.why_no_torch_grouped(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    arguments = make_rows(CASES["large"], 384, 256, torch.bfloat16, device="cuda", **options)
    assert grouped_gemm._fits_torch(arguments["x"], arguments["w"])
    # A product is rounded before bias and LoRA are added: compare with what rounds there too.
    check_rows(grouped_gemm.torch_rows(**arguments, scale=0.5), arguments, scale=0.5)


def test_what_torch_cannot_take_goes_to_ours():
    arguments = make_rows(CASES["large"], 384, 250, torch.bfloat16, device="cuda")
    assert not grouped_gemm._fits_torch(arguments["x"], arguments["w"])
    check_rows(grouped_gemm.grouped_rows(**arguments), arguments)
    arguments = make_rows(CASES["large"], 384, 256, torch.float16, device="cuda")
    assert not grouped_gemm._fits_torch(arguments["x"], arguments["w"])
    check_rows(grouped_gemm.grouped_rows(**arguments), arguments)


@pytest.mark.parametrize("counts", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(16, 300), (200, 8), (260, 136)])
def test_sums_of_outer_products(counts, dtype, height, width):
    groups = make_groups(CASES[counts], "cuda")
    torch.manual_seed(0)
    left = torch.randn(7, height, device="cuda").to(dtype)
    right = torch.randn(groups.num_rows, width, device="cuda").to(dtype)
    index = torch.randint(0, 7, (groups.num_rows,), dtype=torch.int32, device="cuda")
    out = torch.full((height, width, len(CASES[counts])), float("nan"), device="cuda").permute(2, 0, 1)
    grouped_outer.outer_into(left, right, groups, out, left_rows=index)
    check_outer(out, left[index.long()], right, groups.ends)
    out = torch.full((len(CASES[counts]), width, height), float("nan"), device="cuda")
    grouped_outer.outer_into(right, left, groups, out, right_rows=index)
    check_outer(out, right, left[index.long()], groups.ends)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(gate, dtype):
    gate = GATES[gate]
    gu, dv, w = make_activation(333, 700, dtype, gate, device="cuda")
    back = expert_activation.activate_back(dv, gu, w, gate, with_value=True)
    check_activation(expert_activation.activate(gu, gate), back, (gu, dv, w), gate)


def test_back_to_tokens():
    index = torch.stack([torch.randperm(128)[:8] for _ in range(1000)]).cuda()
    routes = expert_routing.sort_by_expert(index, 128)
    y = torch.randn(8000, 2880, device="cuda").bfloat16()
    weights = torch.rand(1000, 8, device="cuda")
    ours = expert_routing.sum_choices(y, routes.place, weights)
    exact = (y[routes.place].double() * weights.double()[..., None]).sum(1)
    assert (ours.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_more_than_2_to_the_31_elements():
    rows, k, n, experts = 2**19 + 77, 4224, 64, 4
    x = torch.empty(rows, k, device="cuda", dtype=torch.bfloat16).normal_()
    w = torch.randn(experts, n, k, device="cuda").bfloat16() * k**-0.5
    ends = torch.tensor([10, 200, 300_000, rows], device="cuda", dtype=torch.int32)
    y = grouped_gemm.triton_rows(x, w, Groups(ends, rows))
    torch.testing.assert_close(y[-50:], x[-50:] @ w[3].T, rtol=2**-6, atol=2**-6)
    back = grouped_gemm.triton_rows(y, w.mT, Groups(ends, rows))
    assert back.numel() > 2**31
    torch.testing.assert_close(back[-50:], y[-50:] @ w[3], rtol=2**-6, atol=2**-6)
    last = grouped_outer.grouped_outer(y, x, ends)[3]
    part = y[300_000:].T.float() @ x[300_000:].float()
    assert (last - part).abs().max() <= 1e-3 * part.abs().max()


def test_more_than_2_to_the_31_weights():
    experts, n, k = 128, 4096, 4224
    w = torch.empty(experts, n, k, device="cuda", dtype=torch.bfloat16).normal_(std=k**-0.5)
    assert w.numel() > 2**31
    x = torch.randn(256, k, device="cuda").bfloat16()
    ends = torch.arange(2, 258, 2, device="cuda", dtype=torch.int32)
    y = grouped_gemm.triton_rows(x, w, Groups(ends, 256))
    torch.testing.assert_close(y[-2:], x[-2:] @ w[-1].T, rtol=2**-6, atol=2**-6)
    y = grouped_gemm.triton_rows(y, w.mT, Groups(ends, 256))
    assert torch.isfinite(y).all()


def test_opcheck():
    groups = make_groups([5, 0, 11], "cuda")
    x = torch.randn(16, 64, device="cuda").bfloat16().requires_grad_()
    w = torch.randn(3, 32, 64, device="cuda").bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.pantheraml.grouped_mm, (x, w, groups.ends))


def fixed_block(family, dtype, fused, **lora):
    """One block whose router answers the same in every dtype; its trained parameters by name."""
    model, _ = build(family, False, parameters=BOTH, **lora)
    model = model.cuda().to(dtype)
    if fused:
        apply_experts(model, find_family(model.config), PatchSet())
    block = model.get_base_model().model.layers[0].mlp
    experts = getattr(model.config, "num_local_experts", None) or model.config.num_experts
    generator = torch.Generator().manual_seed(4)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(300)]).cuda()
    weights = torch.rand(300, 2, generator=generator).cuda().to(dtype).requires_grad_()
    getattr(block, ROUTER[family]).register_forward_hook(lambda *_: (None, weights, index))
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    return block, weights, trained


def run_block(block, weights, trained, dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 100, 128, generator=generator).cuda().to(dtype).requires_grad_()
    dy = torch.randn(3, 100, 128, generator=generator).cuda().to(dtype)
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    gradients = torch.autograd.grad(out, [x, weights, *trained.values()], dy)
    return dict(zip(["out", "x", "weights", *trained], [out.detach(), *gradients], strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_in_bf16_errs_at_most_twice_as_much_as_stock(family, backend, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "BACKENDS", dict.fromkeys(grouped_gemm.BACKENDS, backend))
    exact = run_block(*fixed_block(family, torch.float32, False), torch.float32)
    ours, stock = (
        run_block(*fixed_block(family, torch.bfloat16, fused), torch.bfloat16) for fused in (True, False)
    )
    norm = torch.linalg.vector_norm
    for name, truth in exact.items():
        error, theirs = (float(norm(one[name].float() - truth) / norm(truth)) for one in (ours, stock))
        assert error <= 2 * theirs, f"{name}: {error:.3g}, stock {theirs:.3g}"
        assert error < 0.1, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_twice_and_without_waiting_for_the_device(family):
    parts = fixed_block(family, torch.bfloat16, True)
    first = run_block(*parts, torch.bfloat16)
    x = torch.randn(3, 100, 128, device="cuda").bfloat16().requires_grad_()
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(action="ignore"):  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        out = parts[0](x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in run_block(*parts, torch.bfloat16).items():
        assert torch.equal(value, first[name]), name


def test_a_training_step_never_holds_the_adapted_weights():
    """PEFT's own way forms W + B A of the experts; ours needs no memory of that size."""
    peaks = []
    for fused in (True, False):
        model, _ = build(
            "qwen3_moe",
            False,
            parameters=BOTH,
            sizes=dict(num_hidden_layers=1, hidden_size=1024, moe_intermediate_size=1024, num_experts=32),
        )
        model = model.cuda().to(torch.bfloat16)
        if fused:
            apply_experts(model, find_family(model.config), PatchSet())
        ids = torch.arange(5, 69, device="cuda")[None]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids, labels=ids).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    weights = 32 * 3 * 1024 * 1024 * 2
    assert peaks[0] < 0.5 * weights < weights < peaks[1]


def test_the_fused_path_runs_by_itself(monkeypatch):
    calls = []
    original = ExpertsFunction.apply
    monkeypatch.setattr(ExpertsFunction, "apply", lambda *a: calls.append(1) or original(*a))
    block, weights, trained = fixed_block("mixtral", torch.bfloat16, True)
    run_block(block, weights, trained, torch.bfloat16)
    assert calls == [1]
