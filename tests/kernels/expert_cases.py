"""Inputs and checks for the kernels of experts, shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

import torch

from pantheraml.kernels.expert_activation import Gate
from pantheraml.kernels.expert_groups import Groups
from pantheraml.kernels.grouped_gemm import GroupedLowRank
from tests.kernels.loss_cases import check_all
from tests.references import experts as reference
from tests.references.yardstick import assert_as_good_as

GATES = {
    "silu": Gate(),
    "gpt_oss": Gate(in_turn=True, clamped=True, alpha=1.702, limit=1.5),
    "clamped": Gate(clamped=True, alpha=1.702, limit=1.5),
}
# name -> rows of each expert
COUNTS = {
    "uneven": [5, 0, 17, 1],
    "one row": [0, 0, 1],
    "one expert": [9],
    "first and last empty": [0, 20, 0],
    "many": [1, 0, 2] * 11,
}


def make_groups(counts, device="cpu"):
    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    return Groups(ends, sum(counts))


def make_rows(counts, n, k, dtype, *, stored="nk", indexed=False, bias=False, rank=0, device="cpu", seed=0):
    """Arguments of ``grouped_rows`` as a dict."""
    torch.manual_seed(seed)
    groups, experts = make_groups(counts, device), len(counts)

    def random(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(device, dtype)

    tokens = 7 if indexed else groups.num_rows
    x = random(tokens, k)
    w = random(experts, n, k, scale=k**-0.5) if stored == "nk" else random(experts, k, n, scale=k**-0.5).mT
    rows = torch.randint(0, tokens, (groups.num_rows,)).to(device, torch.int32) if indexed else None
    low_rank = None
    if rank:
        low_rank = GroupedLowRank(random(groups.num_rows, rank), random(experts, n, rank, scale=0.3))
    return dict(
        x=x, w=w, groups=groups, rows=rows, bias=random(experts, n) if bias else None, low_rank=low_rank
    )


def check_rows(ours, arguments, scale=1.0, what="output"):
    """Hold a product against float64 and against PyTorch's own, expert by expert."""
    check_all((what,), [judge_rows(ours, arguments, scale)])


def judge_rows(ours, arguments, scale=1.0):
    """A product of ours, PyTorch's and the exact one, for ``check_all``."""
    a = arguments
    t, b = a["low_rank"] or (None, None)
    ends = a["groups"].ends
    exact = reference.rows(a["x"], a["w"], ends, a["rows"], a["bias"], t, b, scale)
    x = a["x"] if a["rows"] is None else a["x"][a["rows"].long()]
    stock = []
    for expert, (start, end) in enumerate(reference.spans(ends)):
        part = (x[start:end] @ a["w"][expert].T) * scale
        if t is not None:
            part = part + t[start:end] @ b[expert].T
        if a["bias"] is not None:
            part = part + a["bias"][expert]
        stock.append(part)
    return (ours,), (torch.cat(stock),), (exact,)


def check_outer(ours, left, right, ends, what="output"):
    """Hold sums of outer products against float64; stock sums in the inputs' dtype."""
    exact = reference.outer(left, right, ends)
    stock = torch.stack([left[s:e].T @ right[s:e] for s, e in reference.spans(ends)])
    assert_as_good_as(ours, stock.to(ours.dtype), exact, what)


def make_activation(rows, cols, dtype, gate, device="cpu", seed=0):
    """gu, dv, w; some values of a clamped gate lie exactly on the limit."""
    torch.manual_seed(seed)
    gu, dv = torch.randn(rows, 2 * cols) * 1.5, torch.randn(rows, cols)
    if gate.clamped:
        gu.view(-1)[::13] = gate.limit
        gu.view(-1)[::17] = -gate.limit
    return gu.to(device, dtype), dv.to(device, dtype), torch.rand(rows).to(device)


def check_activation(v, back, inputs, gate):
    """Hold v and (dgu, dw, wv) against float64 and against stock PyTorch in the dtype of gu."""
    gu, dv, w = inputs

    def derive(gu, dv, w):
        leaf = gu.detach().requires_grad_()
        w = w.detach().requires_grad_()
        value = stock(leaf, gate) if gu.dtype != torch.float64 else reference.activation(leaf, gate)
        row = value * w[:, None]
        dgu, dw = torch.autograd.grad((row * dv).sum(), (leaf, w))
        return [one.detach() for one in (value, dgu, dw, row)]

    exact = derive(gu.double(), dv.double(), w.double())
    theirs = derive(gu, dv, w)
    ours = [v, *back]
    for name, a, b, c in zip(("v", "dgu", "dw", "wv"), ours, theirs, exact, strict=True):
        assert_as_good_as(a, b.to(a.dtype), c, name)


def stock(gu, gate):
    """What transformers writes."""
    g, u = (gu[..., ::2], gu[..., 1::2]) if gate.in_turn else gu.chunk(2, dim=-1)
    if not gate.clamped:
        return torch.nn.functional.silu(g) * u
    g, u = g.clamp(min=None, max=gate.limit), u.clamp(min=-gate.limit, max=gate.limit)
    return (u + 1) * (g * torch.sigmoid(g * gate.alpha))
