"""Packed rows on a GPU: torch's varlen attention against SDPA with a block-diagonal mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pantheraml.kernels.varlen_attention import read_layout, varlen_attention, why_no_varlen
from pantheraml.models.families import find_family
from pantheraml.models.fused import FusedRMSNorm, apply_fused_parts
from pantheraml.models.patching import PatchSet
from tests import tiny
from tests.references.yardstick import assert_as_good_as

pytestmark = pytest.mark.gpu

LENGTHS = (700, 1, 96, 333, 128, 17)


def positions(lengths=LENGTHS):
    return torch.cat([torch.arange(n) for n in lengths])[None].cuda()


def heads(dtype, lengths=LENGTHS, dim=64):
    torch.manual_seed(0)
    return [torch.randn(1, sum(lengths), h, dim).cuda().to(dtype) for h in (8, 2, 2, 8)]


def masked(q, k, v, mask, scale):
    # heads repeated as transformers does when there is a mask
    q, k, v = (t.repeat_interleave(8 // t.shape[2], dim=2).transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def results(function, tensors, dtype=None):
    q, k, v, dy = (t.to(dtype) if dtype else t for t in tensors)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dy)


def test_the_operator_works_here():
    q, k, v, _ = heads(torch.bfloat16)
    assert why_no_varlen(q, k, v) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 100, 5000])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_errors_are_at_most_twice_those_of_sdpa(dtype, window, dim):
    tensors = heads(dtype, dim=dim)
    layout = read_layout((1, sum(LENGTHS)), tensors[0].device, positions())
    assert layout.cu_seqlens.tolist()[-1] == sum(LENGTHS) and layout.max_seqlen == 700
    mask, scale = layout.mask(window), 0.11
    exact = results(lambda q, k, v: masked(q, k, v, mask, scale), tensors, torch.float64)
    stock = results(lambda q, k, v: masked(q, k, v, mask, scale), tensors)
    ours = results(lambda q, k, v: varlen_attention(q, k, v, layout, scale, window), tensors)
    for name, a, b, c in zip(("output", "dq", "dk", "dv"), ours, stock, exact, strict=True):
        assert_as_good_as(a, b, c, name)


@pytest.mark.parametrize("what", ["float32", "odd heads", "on the CPU"])
def test_what_the_operator_cannot_do_is_told(what):
    q, k, v, _ = heads(
        torch.float32 if what == "float32" else torch.bfloat16, dim=36 if what == "odd heads" else 64
    )
    if what == "on the CPU":
        q, k, v = q.cpu(), k.cpu(), v.cpu()
    assert why_no_varlen(q, k, v)


def run(model, lengths, autocast=False):
    ids = torch.randint(5, tiny.VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(3)).cuda()
    with (
        torch.profiler.profile(acc_events=True) as profile,
        torch.autocast("cuda", torch.bfloat16, enabled=autocast),
    ):
        packed = model(input_ids=ids, position_ids=positions(lengths), use_cache=False).logits
        packed.float().pow(2).mean().backward()
    names = {event.key for event in profile.key_averages()}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        alone = [model(input_ids=document, use_cache=False).logits for document in ids.split(lengths, dim=1)]
    return packed.detach().float(), torch.cat(alone, dim=1).float(), any("varlen" in name for name in names)


NAMES = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3"]


# In half precision a router may choose another expert for a rounding's sake.
@pytest.mark.parametrize(
    ("name", "how"),
    [(n, how) for n in NAMES for how in ("float32", "bfloat16", "autocast")] + [("gpt_oss", "float32")],
)
def test_a_packed_row_is_its_documents_alone(name, how):
    model = tiny.build_model(name, max_position_embeddings=2048).cuda()
    if how == "bfloat16":
        model = model.bfloat16()
    patches = apply_fused_parts(model, find_family(model.config), PatchSet())
    swapped = [change for change in patches.report() if change.what.endswith("FusedRMSNorm")]
    assert sum(isinstance(m, FusedRMSNorm) for m in model.modules()) == len(swapped) > 0
    packed, alone, varlen = run(model, (70, 1, 33, 12), autocast=how == "autocast")
    tolerance = 1e-5 if how == "float32" else 0.03 * alone.abs().max().item()
    assert (packed - alone).abs().max().item() <= tolerance
    assert varlen == (how != "float32" and name != "gemma2")


def test_a_long_packed_row_needs_no_mask():
    model = tiny.build_model("llama", max_position_embeddings=65536, num_hidden_layers=1).cuda().bfloat16()
    apply_fused_parts(model, find_family(model.config), PatchSet())
    lengths = [4096] * 15 + [4095, 1]
    ids = torch.ones(1, 65536, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model.model(input_ids=ids, position_ids=positions(lengths), use_cache=False)
    assert torch.cuda.max_memory_allocated() - before < 2**30  # the mask alone would be 4 GiB


def test_fused_and_stock_train_alike_in_bfloat16():
    stock = tiny.build_model("llama").cuda()
    fused = tiny.build_model("llama").cuda()
    apply_fused_parts(fused, find_family(fused.config), PatchSet())
    ids = torch.randint(5, tiny.VOCAB, (4, 64), generator=torch.Generator().manual_seed(4)).cuda()
    losses = []
    for model in (stock, fused):
        optimizer, curve = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
