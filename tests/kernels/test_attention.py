"""Attention on CPU: the formula against float64, the probe, and the table's decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pantheraml.kernels.attention import AttentionCall, Layout, attend, choose
from pantheraml.kernels.attention.attend import backward, forward
from pantheraml.kernels.attention.backend import Features
from pantheraml.kernels.attention.plain import Plain
from pantheraml.kernels.attention.probe import failure
from tests.references.attention import attention, results
from tests.references.yardstick import assert_as_good_as

CPU = torch.device("cpu")
NAMES = ("output", "dq", "dk", "dv", "dsinks")


def inputs(rows=2, tokens=33, heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, tokens, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return q, k, v, dout, torch.randn(heads, generator=generator)


def documents(rows, tokens):
    offsets = torch.tensor([0, 5, 6, 20, *range(tokens, rows * tokens + 1, tokens)], dtype=torch.int32)
    return Layout((rows, tokens), CPU, offsets, int(offsets.diff().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "features", [{}, {"window": 7}, {"softcap": 1.5}, {"sinks": True}, {"window": 1, "sinks": True}]
)
def test_errors_are_at_most_twice_those_of_the_formula(dtype, heads, packed, features):
    q, k, v, dout, sinks = inputs(heads=heads[0], kv_heads=heads[1], dtype=dtype)
    layout = documents(2, 33) if packed else None
    call = AttentionCall.of(q, k, layout, 0.3, **features)
    sinks = sinks.to(dtype) if call.sinks else None
    assert choose(call).name == "plain" and call.packed == packed

    def stock(q, k, v, s):
        return attention(q, k, v, s, call)

    exact = results(stock, *(t if t is None else t.double() for t in (q, k, v, dout, sinks)))
    theirs = results(stock, q, k, v, dout, sinks)
    ours = results(lambda q, k, v, s: attend(q, k, v, call, s), q, k, v, dout, sinks)
    for name, a, b, c in zip(NAMES, ours, theirs, exact, strict=False):
        assert_as_good_as(a, b, c, name)
    if features or packed:
        bare = AttentionCall.of(q, k, scale=0.3)
        wrong = results(lambda q, k, v, s: attend(q, k, v, bare), q, k, v, dout, None)
        for name, a, b, c in zip(NAMES[:3], wrong, theirs, exact, strict=False):
            with pytest.raises(AssertionError):
                assert_as_good_as(a, b, c, name)


def test_gradcheck_in_float64():
    q, k, v, _, sinks = (t.double().requires_grad_() for t in inputs(1, 9, 2, 1, 4))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    call = AttentionCall.of(q, k, Layout((1, 9), CPU, offsets, 5), None, 3, 2.0, True)
    assert torch.autograd.gradcheck(lambda *t: attend(*t[:3], call, t[3]), (q, k, v, sinks))


def test_autocast_changes_nothing():
    q, k, v, dout, _ = inputs(dtype=torch.bfloat16)
    call = AttentionCall.of(q, k)
    expected = results(lambda q, k, v, s: attend(q, k, v, call), q, k, v, dout, None)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(lambda q, k, v, s: attend(q, k, v, call), q, k, v, dout, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_strided_heads_and_two_steps():
    """q, k, v as slices of one tensor; forward and backward without autograd, from recomputed heads."""
    joined = torch.randn(2, 10, 8, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = joined.split((4, 2, 2), dim=2)
    call = AttentionCall.of(q, k, window=4)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    expected = results(lambda q, k, v, s: attend(q, k, v, call), q, k, v, dout, None)
    backend = choose(call)
    out, kept = forward(backend, q, k, v, call)
    *gradients, none = backward(backend, dout, (q.clone(), k.clone(), v.clone()), out, kept, call)
    assert none is None and kept[0].shape == (2, 4, 10) and kept[0].dtype == torch.float64
    for ours, theirs in zip((out, *gradients), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_call_is_put_in_order():
    q, k, *_ = inputs()
    call = AttentionCall.of(q, k, Layout((2, 33), CPU, None, 33), window=33)
    assert call.window is None and not call.packed and call.scale == 0.25 and call.groups == 2
    call = AttentionCall.of(q, k, documents(2, 33), window=33)
    assert call.window is None and call.packed and call.offsets[1] == 33
    assert AttentionCall.of(q, k, window=32).window == 32


class Wrong(Plain):
    """The formula with one thing ignored."""

    name = "wrong"

    def __init__(self, **changes):
        self.changes = changes

    def forward(self, q, k, v, call):
        return super().forward(q, k, v, replace(call, **self.changes))

    def backward(self, dout, q, k, v, out, kept, call):
        return super().backward(dout, q, k, v, out, kept, replace(call, **self.changes))


class WrongGradient(Plain):
    def backward(self, dout, q, k, v, out, kept, call):
        dq, dk, dv = super().backward(dout, q, k, v, out, kept, call)
        return dq, dk * 1.1, dv


class OwnLse(Plain):
    """A backward that does not take the lse it is given."""

    def backward(self, dout, q, k, v, out, kept, call):
        return super().backward(dout, q, k, v, out, super().forward(q, k, v, call)[1], call)


class Raises(Plain):
    def backward(self, *arguments):
        raise RuntimeError("no kernel image\nand more")


DENSE = Features(CPU, torch.bfloat16, 32, 2, False, False, False, False)
ALL = DENSE._replace(packed=True, window=True, softcap=True, sinks=True)


class TestProbe:
    @pytest.mark.parametrize(
        "features", [DENSE, ALL, DENSE._replace(groups=1, head_dim=128), ALL._replace(groups=8)]
    )
    def test_a_right_backend_is_recognised(self, features):
        assert failure(Plain(), features) is None

    @pytest.mark.parametrize(
        ("wrong", "features", "what"),
        [
            (Wrong(window=None), DENSE._replace(window=True), "output and dq and dk and dv"),
            (Wrong(window=36), DENSE._replace(window=True), "output and dq and dk and dv"),
            (Wrong(softcap=None), DENSE._replace(softcap=True), "output and dq and dk and dv"),
            (Wrong(scale=1.0), DENSE, "output and dq and dk and dv"),
            (WrongGradient(), DENSE, "dk"),
            (OwnLse(), DENSE._replace(sinks=True), "dq and dk and dv"),
        ],
    )
    def test_a_wrong_backend_is_refused(self, wrong, features, what):
        assert failure(wrong, features) == f"tried on cpu, its {what} were wrong"

    def test_what_raises_is_refused_with_the_first_line(self):
        assert failure(Raises(), DENSE) == "tried on cpu, it raised RuntimeError: no kernel image"

    def test_leaking_documents_are_refused(self):
        class Leaking(Plain):
            def forward(self, q, k, v, call):
                out, (lse,) = super().forward(q, k, v, replace(call, layout=None))
                return out, (lse.transpose(0, 1).flatten(1),)

        assert "output" in failure(Leaking(), DENSE._replace(packed=True))

    def test_it_runs_once_per_kind(self):
        calls = []

        class Counting(Plain):
            def forward(self, q, k, v, call):
                calls.append(call)
                return super().forward(q, k, v, call)

        backend = Counting()
        assert [failure(backend, DENSE) for _ in range(3)] == [None] * 3 and len(calls) == 1
        with torch.inference_mode():
            failure(backend, ALL)
        assert len(calls) == 2 and calls[1].packed and calls[1].sinks
