"""Inputs and checks for the kernels of a decoder layer, shared by the CPU, interpreter and GPU tests.

Each adapter below calls one kernel by its public function; a change of a signature is followed there only.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from pantheraml.kernels import add_norm as add_norm_op
from pantheraml.kernels import rope as rope_op
from pantheraml.kernels import rope_qkv as rope_qkv_op
from pantheraml.kernels import swiglu as glu_op
from pantheraml.kernels.rms_norm import RMSNorm
from tests.kernels.loss_cases import check_all, differentiate, even
from tests.references import glu as glu_reference
from tests.references import rms_norm as norm_reference
from tests.references import rope as rope_reference


class Maker:
    """Random tensors of one dtype on one device, rows inside wider rows when ``strided``."""

    def __init__(self, dtype, device="cpu", seed=0, strided=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device, self.strided = dtype, device, strided

    def __call__(self, *shape):
        return self._place(torch.randn(shape, generator=self.generator))

    def even(self, *shape):
        return self._place(even(*shape, generator=self.generator))

    def _place(self, t):
        t, shape = t.to(self.device, self.dtype), t.shape
        if not self.strided or len(shape) < 2:
            return t
        wide = torch.full((*shape[:-1], shape[-1] + 24), 1e4, dtype=self.dtype, device=self.device)
        wide[..., 8 : 8 + shape[-1]] = t
        return wide[..., 8 : 8 + shape[-1]]

    def norm(self, width, offset, cast_first):
        weight = torch.rand(width, generator=self.generator).to(self.device, self.dtype) + 0.5
        return RMSNorm(weight, 1e-5, offset, cast_first)


def stock_norm(x, norm):
    """What transformers writes."""
    weight, eps, offset, cast_first = norm
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        return (weight + offset) * x_hat.to(x.dtype)
    return (x_hat * (offset + weight.float())).to(x.dtype)


# --- rotary positions --------------------------------------------------------------------------------------------


def adapt_rotate(x, head_dim, rotary, bias, norm):
    """y, and x as it is left for the backward."""
    x = x.clone() if x.is_contiguous() else torch.empty_strided(
        x.shape, x.stride(), dtype=x.dtype, device=x.device
    ).copy_(x)  # fmt: skip
    out = None if norm is None else torch.empty_like(x)
    return rope_op.rotate_(x, head_dim, rotary, bias, norm, out), x


def adapt_rotate_back(dy, rotary, out, norm, raw):
    """dx of dy (T, heads, D)."""
    return rope_op.rotate_back(dy, rotary, out, norm, raw)


def check_rotate(make, tokens, heads, head_dim, width=None, *, bias=False, norm=None, halves=2):
    """Forward and backward of one shape against the reference and stock PyTorch; ``norm`` is (offset, cast_first)."""
    check_all(("output", "dx"), [
        _judge_rotate(m, tokens, heads, head_dim, width, bias, norm, halves) for m in make
    ])  # fmt: skip


def _judge_rotate(make, tokens, heads, head_dim, width, bias, norm, halves):
    cols = heads * head_dim
    x = make(tokens, cols)
    bias = make(cols) if bias else None
    norm = make.norm(head_dim, *norm) if norm else None
    dy = make(heads, tokens, head_dim).transpose(0, 1)
    rotary = None if width is None else _make_rotary(make, tokens, width, halves)

    y, raw = adapt_rotate(x, head_dim, rotary, bias, norm)
    assert (y is raw) == (norm is None)
    dx = adapt_rotate_back(dy, rotary, torch.empty_like(x), norm, raw if norm else None)
    exact, stock = _others(head_dim, rotary, bias, norm)
    above = dy.reshape(tokens, cols)
    return (y, dx), differentiate(stock, (x,), above), differentiate(exact, (x.double(),), above.double())


def _make_rotary(make, tokens, width, halves):
    angle = torch.randn(tokens, width // 2, generator=make.generator).to(make.device) * 3
    angle = torch.cat([angle] * halves, dim=-1)
    return rope_op.Rotary(angle.cos().to(make.dtype), angle.sin().to(make.dtype), width)


def _others(head_dim, rotary, bias, norm):
    """What the reference computes, and what transformers writes, of x (T, heads * D)."""
    cos, sin, width = (None, None, None) if rotary is None else rotary

    def exact(x):
        settings = None if norm is None else norm[:3]
        return rope_reference.rotate(x, cos, sin, width, head_dim, bias, settings)

    def stock(x):
        y = (x if bias is None else x + bias).unflatten(1, (-1, head_dim))
        y = y if norm is None else stock_norm(y, norm)
        if rotary is None:
            return y.flatten(1)
        full_cos, full_sin = (torch.cat([p[:, : width // 2]] * 2, -1)[:, None] for p in (cos, sin))
        turned, rest = y[..., :width], y[..., width:]
        first, second = turned.chunk(2, -1)
        turned = turned * full_cos + torch.cat((-second, first), -1) * full_sin
        return torch.cat((turned, rest), -1).flatten(1)

    return exact, stock


# --- rotary positions of q, k and v together ---------------------------------------------------------------------


def adapt_rotate_qkv(x, widths, head_dim, rotary, biases, norms):
    """y, and x as it is left for the backward; x (T, q + k + v), its rows apart or not."""
    rows = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    out = None if norms is None else torch.empty_like(x)
    return rope_qkv_op.rotate_qkv_(rows, widths, head_dim, rotary, biases, norms, out), rows


def adapt_rotate_qkv_back(grads, rotary, out, norms, raw):
    """dx of the gradients of q, k and v, (T, heads, D) each."""
    return rope_qkv_op.rotate_qkv_back(grads, rotary, out, norms, raw)


def check_rotate_qkv(make, tokens, heads, head_dim, width, *, biased="qkv", norm=None, halves=2):
    """q, k and v together against the reference and stock PyTorch, and bit by bit against one at a time.

    ``heads`` is (heads, kv_heads); ``biased`` names the tensors that have a bias; ``norm`` as in ``check_rotate``.
    """
    found = [_judge_rotate_qkv(m, tokens, heads, head_dim, width, biased, norm, halves) for m in make]
    names = ("output", "dx")
    check_all(names, [result for result, _ in found])
    for (ours, *_), alone in found:
        for name, one, other in zip(names, ours, alone, strict=True):
            assert torch.equal(one, other), f"{name} is not that of one tensor at a time"


def _judge_rotate_qkv(make, tokens, heads, head_dim, width, biased, norm, halves):
    """Ours, stock's and the exact output and dx; and ours of one tensor at a time."""
    heads, kv_heads = heads
    widths = tuple(n * head_dim for n in (heads, kv_heads, kv_heads))
    x = make(tokens, sum(widths))
    biases = [make(cols) if name in biased else None for name, cols in zip("qkv", widths, strict=True)]
    norms = (make.norm(head_dim, *norm), make.norm(head_dim, *norm)._replace(eps=1e-3)) if norm else None
    rotary = _make_rotary(make, tokens, width, halves)
    # As attention backends return them: heads first, tokens first, and with no stride of 1 along a head.
    grads = (
        make(heads, tokens, head_dim).transpose(0, 1),
        make(tokens, kv_heads, head_dim),
        make(tokens, head_dim, kv_heads).transpose(1, 2),
    )
    y, raw = adapt_rotate_qkv(x, widths, head_dim, rotary, biases, norms)
    assert (y is raw) == (norms is None)
    dx = adapt_rotate_qkv_back(grads, rotary, torch.empty_like(x), norms, raw if norms else None)

    turns, norms = (rotary, rotary, None), (None, None, None) if norms is None else (*norms, None)
    alone = _one_at_a_time(x, widths, head_dim, grads, turns, biases, norms)
    columns = []
    for x_, y_, dx_, dy, *settings in zip(
        *(t.split(widths, dim=1) for t in (x, y, dx)), grads, turns, biases, norms, strict=True
    ):
        exact, stock = _others(head_dim, *settings)
        above = dy.reshape(dx_.shape)
        truth = differentiate(exact, (x_.double(),), above.double())
        columns.append(((y_, dx_), differentiate(stock, (x_,), above), truth))
    joined = (
        tuple(torch.cat(t, dim=1) for t in zip(*found, strict=True)) for found in zip(*columns, strict=True)
    )
    return tuple(joined), alone


def _one_at_a_time(x, widths, head_dim, grads, turns, biases, norms):
    """y and dx by a call for each of q, k and v, in memory laid out as that of the call for all."""
    raw = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    y = raw if norms[0] is None else torch.empty_like(x)
    dx = torch.empty_like(x)
    parts = (t.split(widths, dim=1) for t in (raw, y, dx))
    for raw_, y_, dx_, dy, turn, bias, norm in zip(*parts, grads, turns, biases, norms, strict=True):
        rope_op.rotate_(raw_, head_dim, turn, bias, norm, y_)
        rope_op.rotate_back(dy, turn, dx_, norm, None if norm is None else raw_)
    return y, dx


def adapt_trained_head_norms(grads, rotary, out, norms, raw):
    """dx, and the gradients of the weights of q's and k's head norms."""
    dw = tuple(torch.full_like(norm.weight, 7.0, dtype=torch.float32) for norm in norms)
    return rope_qkv_op.rotate_qkv_back(grads, rotary, out, norms, raw, dw), *dw


def check_trained_head_norms(make, tokens, heads, head_dim, width, *, norm, halves=2):
    """The gradients of the head norms' weights; dx is, bit by bit, that of frozen ones."""
    check_all(("dw of q", "dw of k"), [
        _judge_trained_head_norms(m, tokens, heads, head_dim, width, norm, halves) for m in make
    ])  # fmt: skip


def _judge_trained_head_norms(make, tokens, heads, head_dim, width, norm, halves):
    heads, kv_heads = heads
    widths = tuple(n * head_dim for n in (heads, kv_heads, kv_heads))
    x, rotary = make(tokens, sum(widths)), _make_rotary(make, tokens, width, halves)
    norms = (make.norm(head_dim, *norm), make.norm(head_dim, *norm)._replace(eps=1e-3))
    grads = tuple(make(n, tokens, head_dim).transpose(0, 1) for n in (heads, kv_heads, kv_heads))
    dx, *ours = adapt_trained_head_norms(grads, rotary, torch.empty_like(x), norms, x)
    assert torch.equal(dx, adapt_rotate_qkv_back(grads, rotary, torch.empty_like(x), norms, x))
    stock, exact = [], []
    for part, dy, one in zip(x.split(widths, 1), grads, norms, strict=False):
        above = dy.reshape(part.shape)

        def of(weight, which, part=part, one=one):
            return _others(head_dim, rotary, None, one._replace(weight=weight))[which](part)

        exact += differentiate(partial(of, which=0), (one.weight.double(),), above.double())[1:]
        stock += differentiate(partial(of, which=1), (one.weight,), above)[1:]
    return tuple(dw.to(make.dtype) for dw in ours), stock, exact


# --- gated activations -------------------------------------------------------------------------------------------


def adapt_glu(g, u, activation):
    return glu_op.glu_forward(g, u, activation, torch.empty_like(g))


def adapt_glu_back(dy, g, u, activation):
    """dg, du, and y once more."""
    out = tuple(torch.empty_like(g) for _ in range(3))
    glu_op.glu_backward(dy, g, u, activation, out)
    return out


def check_glu(make, rows, cols, activation):
    check_all(("output", "dg", "du", "output again"), [
        _judge_glu(m, rows, cols, activation) for m in make
    ])  # fmt: skip


def _judge_glu(make, rows, cols, activation):
    g, u, dy = make(rows, cols), make.even(rows, cols), make.even(rows, cols)
    ours = adapt_glu(g, u, activation)
    dg, du, again = adapt_glu_back(dy, g, u, activation)

    def stock(g, u):
        if activation == "silu":
            return functional.silu(g) * u
        return functional.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none") * u

    exact = partial(glu_reference.glu, activation=activation)
    truth = differentiate(exact, (g.double(), u.double()), dy.double())
    other = differentiate(stock, (g, u), dy)
    return (ours, dg, du, again), (*other, other[0]), (*truth, truth[0])


# --- residual and norm -------------------------------------------------------------------------------------------


def adapt_add_norm(x, y, norm):
    """s and h."""
    h = torch.empty_like(x)
    return add_norm_op.add_norm(x, y, norm, h), h


def adapt_norm_back(dh, ds, s, norm):
    """dx, and h once more."""
    out, h = torch.empty_like(s), torch.empty_like(s)
    return add_norm_op.norm_backward(dh, ds, s, norm, out, h), h


def adapt_trained_norm_back(dh, ds, s, norm):
    """dx, h once more, and the gradient of the norm's weight."""
    out, h = torch.empty_like(s), torch.empty_like(s)
    dw = torch.full_like(norm.weight, 7.0, dtype=torch.float32)
    return add_norm_op.norm_backward(dh, ds, s, norm, out, h, dw), h, dw


def check_add_norm(make, rows, cols, *, norm=(0.0, True), residual=True):
    check_all(("s", "h", "dx", "h again", "dx of a trained norm", "its h", "dw"), [
        _judge_add_norm(m, rows, cols, norm, residual) for m in make
    ])  # fmt: skip


def _judge_add_norm(make, rows, cols, norm, residual):
    x, y, dh = (make(rows, cols) for _ in range(3))
    ds = make(rows, cols) if residual else None
    norm = make.norm(cols, *norm)
    s, h = adapt_add_norm(x, y, norm)
    dx, again = adapt_norm_back(dh, ds, x, norm)
    *trained, dw = adapt_trained_norm_back(dh, ds, x, norm)
    ours = (s, h, dx, again, *trained, dw.to(make.dtype))

    total = x.double() + y.double()
    exact_norm = lambda x: norm_reference.rms_norm(x, norm.weight, norm.eps, norm.offset)  # noqa: E731
    of_weight = lambda w: norm_reference.rms_norm(x, w, norm.eps, norm.offset)  # noqa: E731
    of_x, exact_dx = differentiate(exact_norm, (x.double(),), dh.double())
    exact_dw = differentiate(of_weight, (norm.weight.double(),), dh.double())[1]
    exact_dx = exact_dx if ds is None else exact_dx + ds.double()
    truth = (total, exact_norm(total), exact_dx, of_x, exact_dx, of_x, exact_dw)

    other_s = y + x
    stock_x, stock_dx = differentiate(lambda x: stock_norm(x, norm), (x,), dh)
    stock_dx = stock_dx if ds is None else stock_dx + ds
    stock_of = lambda w: stock_norm(x, norm._replace(weight=w))  # noqa: E731
    stock_dw = differentiate(stock_of, (norm.weight,), dh)[1]
    other = (other_s, stock_norm(other_s, norm), stock_dx, stock_x, stock_dx, stock_x, stock_dw)
    return ours, other, truth
