"""The Triton kernels of experts under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import expert_activation, expert_routing, grouped_gemm, grouped_outer
from pantheraml.models.fused import experts
from tests.fused.test_experts import CASES, FAMILIES, assert_equal, build, run
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

PLAIN = [
    # rows per expert, N, K, dtype, options
    ("uneven", 33, 20, torch.float32, dict()),
    ("uneven", 150, 33, torch.float16, dict(stored="kn")),
    ("many", 16, 64, torch.float16, dict()),
    ("one row", 40, 7, torch.float32, dict(indexed=True)),
    ("one expert", 130, 64, torch.float16, dict(bias=True, rank=4)),
    ("first and last empty", 20, 32, torch.float32, dict(indexed=True, bias=True, rank=17, stored="kn")),
    ("uneven", 4, 100, torch.float32, dict(indexed=True)),
]


@pytest.mark.parametrize(("counts", "n", "k", "dtype", "options"), PLAIN)
def test_products(counts, n, k, dtype, options):
    arguments = make_rows(COUNTS[counts], n, k, dtype, **options)
    check_rows(grouped_gemm.triton_rows(**arguments, scale=0.5), arguments, scale=0.5)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_every_tile_of_rows(block, monkeypatch):
    monkeypatch.setattr(grouped_gemm.Groups, "block", block)
    arguments = make_rows([70, 3, 0, 65], 20, 40, torch.float16, rank=3)
    check_rows(grouped_gemm.triton_rows(**arguments), arguments)


def test_gradients_of_x_read_the_weight_turned():
    arguments = make_rows(COUNTS["uneven"], 24, 40, torch.float32)
    arguments["w"] = arguments["w"].contiguous()
    back = {**arguments, "x": torch.randn(23, 24), "w": arguments["w"].mT}
    check_rows(grouped_gemm.triton_rows(**back), back)


def test_the_pass_that_adds_bias_and_lora():
    arguments = make_rows(COUNTS["uneven"], 200, 20, torch.float32, bias=True, rank=4)
    plain = {**arguments, "bias": None, "low_rank": None}
    y = grouped_gemm.triton_rows(**plain)
    grouped_gemm.triton_add_(y, arguments["groups"], arguments["bias"], arguments["low_rank"])
    check_rows(y, arguments)


@pytest.mark.parametrize("counts", COUNTS)
def test_tiles_cover_every_row_once(counts):
    groups = make_groups(COUNTS[counts])
    for block in (16, 4):
        expert, first, end = groups.tiles(block)
        seen = []
        for e, a, b in zip(expert.tolist(), first.tolist(), end.tolist(), strict=True):
            if e >= 0:
                seen += [(e, row) for row in range(a, min(a + block, b))]
        assert seen == [(e, row) for e, (a, b) in enumerate(groups.spans()) for row in range(a, b)]
        assert groups.tiles(block) is groups.tiles(block)


@pytest.mark.parametrize(
    ("counts", "height", "width", "dtype"),
    [
        ("uneven", 4, 70, torch.float32),
        ("first and last empty", 150, 3, torch.float16),
        ("many", 16, 16, torch.float32),
        ("one row", 33, 40, torch.float32),
    ],
)
def test_sums_of_outer_products(counts, height, width, dtype):
    groups = make_groups(COUNTS[counts])
    torch.manual_seed(0)
    left, right = torch.randn(7, height).to(dtype), torch.randn(groups.num_rows, width).to(dtype)
    index = torch.randint(0, 7, (groups.num_rows,), dtype=torch.int32)
    # as PEFT stores B: the experts in turn
    out = torch.full((height, width, len(COUNTS[counts])), float("nan")).permute(2, 0, 1)
    grouped_outer.triton_outer(left, right, groups.ends, out, left_rows=index)
    check_outer(out, left[index.long()], right, groups.ends)
    out = torch.full((len(COUNTS[counts]), width, height), float("nan"))
    grouped_outer.triton_outer(right, left, groups.ends, out, right_rows=index)
    check_outer(out, right, left[index.long()], groups.ends)


def test_a_sum_over_rows_by_ones_that_are_one_number():
    groups = make_groups(COUNTS["uneven"])
    dy = torch.randn(23, 40)
    out = torch.empty(4, 40, 1)
    grouped_outer.triton_outer(dy, torch.ones(1, 1).expand(23, 1), groups.ends, out)
    check_outer(out, dy, torch.ones(23, 1), groups.ends)


@pytest.mark.parametrize("weighted", [True, False])
def test_back_to_tokens(weighted):
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(5)[:3] for _ in range(11)])
    routes = expert_routing.sort_by_expert(index, 5)
    y, weights = torch.randn(33, 1030), torch.rand(11, 3) if weighted else None
    ours = expert_routing.triton_sum(y, routes.place, weights)
    torch.testing.assert_close(
        ours, expert_routing.sum_choices(y, routes.place, weights), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("rows", "cols", "dtype"), [(75, 133, torch.float32), (1, 300, torch.float16)])
def test_activation(gate, rows, cols, dtype):
    gate = GATES[gate]
    inputs = make_activation(rows, cols, dtype, gate)
    v = expert_activation.triton_activate(inputs[0], gate)
    gu, dv, w = inputs
    back = expert_activation.triton_activate_back(dv, gu, w, gate, True)
    check_activation(v, back, inputs, gate)
    same = expert_activation.triton_activate_back(dv, gu, w, gate, False)
    assert same[2] is None and torch.equal(same[0], back[0]) and torch.equal(same[1], back[1])


def test_offsets_past_2_to_the_31():
    # Rows and experts 2^30 elements apart, in memory that is mostly never touched.
    step, k, n = 2**30, 32, 16
    arguments = make_rows([1, 2, 1], n, k, torch.float16)
    exact = grouped_gemm.triton_rows(**arguments)
    far_x = torch.empty(3 * step + k, dtype=torch.float16).as_strided((4, k), (step, 1))
    far_w = torch.empty(2 * step + n * k, dtype=torch.float16).as_strided((3, n, k), (step, k, 1))
    far_x.copy_(arguments["x"])
    far_w.copy_(arguments["w"])
    far = {**arguments, "x": far_x, "w": far_w}
    assert torch.equal(grouped_gemm.triton_rows(**far), exact)
    far_out = torch.empty(2 * step + k * k, dtype=torch.float16).as_strided((3, k, k), (step, k, 1))
    ends = arguments["groups"].ends
    ours = grouped_outer.triton_outer(far_x, far_x, ends, far_out)
    near = grouped_outer.triton_outer(arguments["x"], arguments["x"], ends, torch.empty(3, k, k).half())
    assert torch.equal(ours, near)


@pytest.mark.parametrize(
    ("family", "case"), [*((family, "experts") for family in FAMILIES), ("gpt_oss", "full")]
)
def test_whole_models_on_the_kernels(family, case, monkeypatch):
    sizes = dict(
        num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_experts=4, moe_intermediate_size=24
    )
    arguments = dict(CASES[case], sizes=sizes)
    theirs = run(build(family, False, **arguments)[0])
    used = []

    def outer_into(left, right, groups, out, left_rows=None, right_rows=None):
        used.append("outer")
        return grouped_outer.triton_outer(left, right, groups.ends, out, left_rows, right_rows)

    monkeypatch.setattr(experts, "outer_into", outer_into)
    monkeypatch.setattr(experts, "grouped_rows", grouped_gemm.triton_rows)
    monkeypatch.setattr(experts, "sum_choices", expert_routing.triton_sum)
    monkeypatch.setattr(experts, "activate", expert_activation.triton_activate)
    monkeypatch.setattr(
        experts,
        "activate_back",
        lambda *a, with_value: expert_activation.triton_activate_back(*a, with_value),
    )
    assert_equal(run(build(family, True, **arguments)[0]), theirs)
    assert len(used) >= 2


def test_wrong_kernels_are_seen():
    arguments = make_rows(COUNTS["uneven"], 33, 20, torch.float32, rank=4)
    y = grouped_gemm.triton_rows(**arguments)
    with pytest.raises(AssertionError, match="output"):
        check_rows(y * (1 + 1e-5), arguments)
    without = grouped_gemm.triton_rows(**{**arguments, "low_rank": None})
    with pytest.raises(AssertionError, match="output"):
        check_rows(without, arguments)
    late = grouped_gemm.Groups(arguments["groups"].ends.clone(), 23)
    late.ends[2] -= 1  # one row goes to its neighbour's expert
    with pytest.raises(AssertionError, match="output"):
        check_rows(grouped_gemm.triton_rows(**{**arguments, "groups": late}), arguments)
    gate = GATES["gpt_oss"]
    gu, dv, w = make_activation(5, 33, torch.float32, gate)
    v = expert_activation.triton_activate(gu, gate)
    dgu, dw, wv = expert_activation.triton_activate_back(dv, gu, w, gate._replace(limit=1.4), True)
    with pytest.raises(AssertionError, match="dgu"):
        check_activation(v, (dgu, dw, wv), (gu, dv, w), gate)
