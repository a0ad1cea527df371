"""Backends that need a GPU: what they pass to their kernels, checked on CPU against kernels of the same form."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.kernels.attention import AttentionCall, Layout, package
from pantheraml.kernels.attention.attend import backward, forward
from pantheraml.kernels.attention.cudnn import CuDNN
from pantheraml.kernels.attention.flash_attn_2 import FlashAttn2
from pantheraml.kernels.attention.flash_attn_3 import FlashAttn3
from pantheraml.kernels.attention.flash_attn_4 import FlashAttn4
from pantheraml.kernels.attention.flex import Flex, build_block_mask
from pantheraml.kernels.attention.plain import Plain
from pantheraml.kernels.attention.torch_efficient import TorchEfficient, _to_documents, _to_tokens
from pantheraml.kernels.attention.torch_flash import TorchFlash
from tests.references.attention import attention, results

CPU = torch.device("cpu")
DOCUMENTS = [0, 5, 6, 20, 33, 66]


def example(packed, device=CPU, dtype=torch.float32, **features):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 33, h, 16, generator=generator).to(device, dtype) for h in (4, 2, 2, 4))
    offsets = torch.tensor(DOCUMENTS, dtype=torch.int32, device=device)
    layout = Layout((2, 33), device, offsets, 33) if packed else None
    sinks = torch.randn(4, generator=generator).to(device) if features.get("sinks") else None
    return AttentionCall.of(q, k, layout, 0.3, **features), q, k, v, dout, sinks


def check(backend, call, q, k, v, dout, sinks):
    """Against the formula."""
    out, kept = forward(backend, q, k, v, call, sinks)
    *gradients, dsinks = backward(backend, dout, (q.clone(), k.clone(), v.clone()), out, kept, call, sinks)
    expected = results(lambda *t: attention(*t, call), q, k, v, dout, sinks)
    for ours, right in zip((out, *gradients, dsinks), expected, strict=False):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


FEATURES = [
    {},
    {"window": 7},
    {"softcap": 1.5},
    {"sinks": True},
    {"softcap": 1.5, "window": 7, "sinks": True},
]
both = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


class NoMeta(TorchDispatchMode):
    """Answers for an operator whose own function for meta tensors misses an argument."""

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        if function is torch.ops.aten._efficient_attention_backward.default:
            bound = dict(zip((a.name for a in function._schema.arguments), arguments, strict=False))
            assert bound["out"].shape == bound["query"].shape and bound["custom_mask_type"] == 1
            assert bound["logsumexp"].dtype == torch.float32 and set(keywords) <= {"scale", "window_size"}
            return *(torch.empty_like(bound[name]) for name in ("query", "key", "value")), None
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("backend", "packed"),
    [(backend, packed) for backend in (TorchFlash(), TorchEfficient()) for packed in (False, True)]
    + [(CuDNN(), False)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_calls_fit_the_operators_of_this_torch(backend, packed):
    for window in (None, 7) if backend.name != "cudnn" else (None,):
        call, q, k, v, dout, _ = example(packed, torch.device("meta"), torch.bfloat16, window=window)
        out, kept = backend.forward(q, k, v, call)
        assert out.shape == q.shape and kept[0].shape == ((4, 66) if packed else (2, 4, 33))
        with NoMeta():
            gradients = backend.backward(dout, q, k, v, out, kept, call)
        assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_padded_lse_there_and_back():
    call, *_ = example(True)
    lse = torch.arange(4 * 66.0).view(4, 66)
    padded = _to_documents(lse, call)
    assert padded.shape == (5, 4, 64) and padded[0, 0, :6].tolist() == [0, 1, 2, 3, 4, float("inf")]
    assert torch.equal(_to_tokens(padded, call), lse)
    call, *_ = example(False)
    lse = torch.randn(2, 4, 33)
    padded = _to_documents(lse, call)
    assert padded.shape == (2, 4, 64) and torch.equal(_to_tokens(padded, call), lse)


def described(q, cu, scale, causal, left, right, softcap, shared):
    """The call that arguments of a FlashAttention describe, for q (B, S, H, D) or (tokens, H, D)."""
    open_ended = (None, -1)
    assert causal == (left in open_ended) and (right == 0 if left not in open_ended else right in open_ended)
    window = None if left in open_ended else left + 1
    softcap = softcap or None
    return replace(
        shared, scale=scale, window=window, softcap=softcap, layout=shared.layout if cu is not None else None
    )


class Kernels:
    """Modules with the signatures of the FlashAttention packages, computing by the formula."""

    def __init__(self, shared):
        self.shared = shared

    def forward(self, q, k, v, cu, scale, causal, left, right, softcap):
        call = described(q, cu, scale, causal, left, right, softcap, self.shared)
        assert (q.ndim == 3) == (cu is not None)
        out, (lse,) = Plain().forward(*self._rows(q, k, v), call)
        return out.view(q.shape), lse.float()

    def backward(self, tensors, lse, cu, scale, causal, left, right, softcap):
        call = described(tensors[1], cu, scale, causal, left, right, softcap, self.shared)
        gradients = Plain().backward(*self._rows(*tensors), (lse,), call)
        return [g.view(t.shape) for g, t in zip(gradients, tensors[1:4], strict=True)]

    def _rows(self, *tensors):
        return [t.view(2, 33, *t.shape[-2:]) for t in tensors]

    def flash_attn_4(self):
        def fwd(q, k, v, *, return_lse, softmax_scale, causal, softcap, window_size_left, window_size_right,
                cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):  # fmt: skip
            assert return_lse and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
            window = window_size_left, window_size_right
            return (
                *self.forward(q, k, v, cu_seqlens_q, softmax_scale, causal, *window, softcap),
                None,
                None,
                None,
            )

        def bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                max_seqlen_k=None):  # fmt: skip
            options = softmax_scale, causal, window_size_left, window_size_right, softcap
            return self.backward((dout, q, k, v, out), lse, cu_seqlens_q, *options)

        return "flash_attn.cute.interface", {"_flash_attn_fwd": fwd, "_flash_attn_bwd": bwd}

    def flash_attn_3(self):
        def fwd(q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0):  # fmt: skip
            window = window_size_left, window_size_right
            return *self.forward(q, k, v, cu_seqlens_q, softmax_scale, causal, *window, softcap), None, None

        def bwd(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
                max_seqlen_k, dq, dk, dv, softmax_scale, is_causal, window_size_left=-1, window_size_right=-1,
                softcap=0.0, deterministic=False, sm_margin=0):  # fmt: skip
            assert sequed_q is sequed_k is None and (max_seqlen_q is None) == (cu_seqlens_q is None)
            options = softmax_scale, is_causal, window_size_left, window_size_right, softcap
            for target, g in zip(
                (dq, dk, dv),
                self.backward((dout, q, k, v, out), softmax_lse, cu_seqlens_q, *options),
                strict=True,
            ):
                target.copy_(g)

        return "flash_attn_interface", {"_flash_attn_forward": fwd, "_flash_attn_backward": bwd}

    def flash_attn_2(self):
        def fwd(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                alibi_slopes, return_softmax, cu=None):  # fmt: skip
            assert dropout_p == 0.0 and alibi_slopes is None and not return_softmax
            window = window_size_left, window_size_right
            return *self.forward(q, k, v, cu, softmax_scale, causal, *window, softcap), None, None

        def bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, cu=None):  # fmt: skip
            options = softmax_scale, causal, window_size_left, window_size_right, softcap
            for target, g in zip(
                (dq, dk, dv), self.backward((dout, q, k, v, out), softmax_lse, cu, *options), strict=True
            ):
                target.copy_(g)

        def varlen_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **rest):
            return fwd(q, k, v, cu=cu_seqlens_q, **rest)

        def varlen_bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                       max_seqlen_k, **rest):  # fmt: skip
            bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu=cu_seqlens_q, **rest)

        functions = {"_flash_attn_forward": fwd, "_flash_attn_backward": bwd}
        functions |= {"_flash_attn_varlen_forward": varlen_fwd, "_flash_attn_varlen_backward": varlen_bwd}
        return "flash_attn.flash_attn_interface", functions


@both
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("backend", [FlashAttn4(), FlashAttn3(), FlashAttn2()], ids=lambda b: b.name)
def test_what_packages_are_called_with(backend, packed, features, monkeypatch):
    call, *tensors = example(packed, **features)
    name, functions = getattr(Kernels(call), backend.name.replace("-", "_"))()
    parts = name.split(".")
    for depth in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: depth + 1]), types.ModuleType(parts[depth]))
    vars(sys.modules[name]).update(functions)
    package._find.cache_clear()
    try:
        check(backend, call, *tensors)
    finally:
        package._find.cache_clear()


def test_absent_and_broken_packages(monkeypatch, tmp_path):
    package._find.cache_clear()
    assert package.why_absent("no_such_package.inner", "f") == "not installed"
    (tmp_path / "broken_attention.py").write_text("raise OSError('undefined symbol: _ZN3c10\\n')")
    (tmp_path / "needs_more.py").write_text("import no_such_compiler")
    monkeypatch.syspath_prepend(tmp_path)
    assert package.why_absent("broken_attention", "f") == "cannot be used: OSError: undefined symbol: _ZN3c10"
    assert package.why_absent("needs_more", "f") == "cannot be used: No module named 'no_such_compiler'"
    assert package.why_absent("math", "no_function").startswith("cannot be used: AttributeError")
    assert package.why_absent("math", "sin") is None and package.functions("math", "sin")[0](0) == 0
    package._find.cache_clear()


class TestFlex:
    def stand_in(self, q, k, v, *, score_mod, block_mask, scale, enable_gqa, return_aux):
        """flex_attention with a backward on CPU."""
        assert return_aux.lse and enable_gqa == (q.shape[1] != k.shape[1])
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        z, place = q @ k.mT * scale, torch.arange(q.shape[2])
        z = score_mod(z, None, None, None, None) if score_mod else z
        visible = block_mask.mask_mod(None, None, place[:, None], place[None])
        z = z.masked_fill(~visible, float("-inf"))
        return z.softmax(-1) @ v, types.SimpleNamespace(lse=z.logsumexp(-1))

    @both
    @pytest.mark.parametrize("features", FEATURES, ids=str)
    def test_against_the_formula(self, packed, features, monkeypatch):
        monkeypatch.setattr("pantheraml.kernels.attention.flex._compiled", lambda: self.stand_in)
        check(Flex(), *example(packed, **features))

    @both
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize("features", FEATURES, ids=str)
    def test_forward_of_the_uncompiled_function(self, packed, features, monkeypatch):
        from torch.nn.attention.flex_attention import flex_attention

        monkeypatch.setattr("pantheraml.kernels.attention.flex._compiled", lambda: flex_attention)
        call, q, k, v, _, sinks = example(packed, **features)
        out, kept = forward(Flex(), q, k, v, call, sinks)
        right, (lse,) = forward(Plain(), q, k, v, call, sinks)
        torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept[0], lse.float(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("window", [None, 1, 40, 128, 300])
    @pytest.mark.parametrize("offsets", [[0, 700], [0, 5, 6, 130, 256, 384, 700], [0, 128, 256, 700]])
    def test_blocks_are_those_of_the_mask(self, offsets, window):
        begin = torch.cat([torch.full((b - a,), a, dtype=torch.int32) for a, b in pairwise(offsets)])
        ours = build_block_mask(begin, window)
        layout = Layout((1, 700), CPU, torch.tensor(offsets, dtype=torch.int32), 700)
        mask = torch.zeros(768, 768)
        mask[:700, :700] = layout.mask(window)[0, 0]
        per_block = mask.view(6, 128, 6, 128).sum((1, 3))
        full = torch.ones(768, 768)
        full[700:] = full[:, 700:] = 0
        assert torch.equal(ours.to_dense()[0, 0] > 0, per_block > 0)
        whole = torch.zeros(6, 6, dtype=torch.bool)
        for row in range(6):
            whole[row, ours.full_kv_indices[0, 0, row, : ours.full_kv_num_blocks[0, 0, row]].long()] = True
        seen = per_block == full.view(6, 128, 6, 128).sum((1, 3))
        assert torch.equal(whole, seen & (per_block > 0) & ~torch.eye(6, dtype=torch.bool))
