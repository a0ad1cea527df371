"""What decides about the operator for packed rows; it runs itself in tests/gpu/test_attention.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pantheraml.kernels import varlen_attention as op

CPU = torch.device("cpu")


def per_document(q, k, v, cu_seqlens, max_seqlen, scale, window):
    """Documents one after the other through SDPA."""
    outs = []
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None, :]
        mask = (back >= 0) & (back < (window or max_seqlen))
        heads = [t[begin:end].transpose(0, 1)[None] for t in (q, k, v)]
        out = functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def without_window(q, k, v, cu_seqlens, max_seqlen, scale, window):
    return per_document(q, k, v, cu_seqlens, max_seqlen, scale, None)


def without_documents(q, k, v, cu_seqlens, max_seqlen, scale, window):
    return per_document(q, k, v, cu_seqlens[[0, -1]], 16, scale, window)


def without_scale(q, k, v, cu_seqlens, max_seqlen, scale, window):
    return per_document(q, k, v, cu_seqlens, max_seqlen, None, window)


def without_gradient(q, k, v, cu_seqlens, max_seqlen, scale, window):
    out = per_document(q, k.detach(), v, cu_seqlens, max_seqlen, scale, window)
    return out + 0 * k.sum()


def test_a_right_operator_is_recognised():
    assert op._is_right(per_document, CPU)


@pytest.mark.parametrize("wrong", [without_window, without_documents, without_scale, without_gradient])
def test_a_wrong_operator_is_refused(wrong):
    assert not op._is_right(wrong, CPU)


def test_the_probe_says_why_nothing_works():
    assert op._probe(CPU).startswith("torch's varlen attention does not work on cpu (")


def test_reasons():
    half = torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16)
    assert op.why_no_varlen(half, half, half) == "attention without a mask needs a GPU"
