"""Attention on a GPU: every backend that loads, against float64 and stock SDPA; then whole models."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pantheraml import FastLanguageModel
from pantheraml.kernels.attention import AttentionCall, attend, choose, probe, read_layout, table
from pantheraml.kernels.attention.attend import backward, forward
from pantheraml.kernels.attention.probe import SOFTCAP
from pantheraml.models.families import find_family
from pantheraml.models.fused import FusedRMSNorm, apply_fused_parts
from pantheraml.models.patching import PatchSet
from tests import tiny
from tests.references.attention import attention, results
from tests.references.yardstick import assert_as_good_as

pytestmark = pytest.mark.gpu

LENGTHS = (700, 1, 96, 333, 128, 17)
BACKENDS = {backend.name: backend for backend in (*table.DENSE, *table.PACKED)}
COMPILING = ("flash-attn-4", "flex")
NAMES = ("output", "dq", "dk", "dv", "dsinks")
# Soft-caps that bite, and the probe's own: kernels that compile themselves compile it in.
FEATURES = {
    "": {},
    "window 100": {"window": 100},
    "softcap": {"softcap": SOFTCAP},
    "softcap, window": {"softcap": SOFTCAP, "window": 100},
    "sinks": {"sinks": True},
    "sinks, window 1": {"sinks": True, "window": 1},
    "sinks, window": {"sinks": True, "window": 100},
}


def positions(lengths=LENGTHS):
    return torch.cat([torch.arange(n) for n in lengths])[None].cuda()


def example(packed, dtype, dim=64, heads=(8, 2), **features):
    torch.manual_seed(0)
    rows, tokens = (1, sum(LENGTHS)) if packed else (2, 519)
    q, k, v, dout = (
        torch.randn(rows, tokens, h, dim).cuda().to(dtype) for h in (heads[0], heads[1], heads[1], heads[0])
    )
    sinks = torch.randn(heads[0]).cuda() if features.get("sinks") else None
    layout = read_layout((rows, tokens), q.device, positions()) if packed else None
    return AttentionCall.of(q, k, layout, 0.11, **features), q, k, v, dout, sinks


def run_backend(backend, call, q, k, v, dout, sinks):
    out, kept = forward(backend, q, k, v, call, sinks)
    # what a layer that recomputes does: other tensors, the same numbers
    again = tuple(t.clone() for t in (q, k, v))
    *gradients, dsinks = backward(backend, dout, again, out, kept, call, sinks)
    return [out, *gradients, *([] if sinks is None else [dsinks])]


@pytest.mark.filterwarnings(
    "ignore"
)  # torch's own compiler warns of itself, and fails where that is an error
@pytest.mark.parametrize("features", list(FEATURES))
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("dtype", "dim", "heads"),
    [
        (torch.bfloat16, 128, (8, 2)),
        (torch.float16, 64, (8, 8)),
        (torch.bfloat16, 64, (8, 1)),
        (torch.bfloat16, 256, (4, 2)),
        (torch.bfloat16, 96, (4, 4)),
    ],
)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_errors_are_at_most_twice_those_of_the_formula(name, dtype, dim, heads, packed, features):
    few = ("", "window 100", "softcap", "sinks, window") if dim == 128 else ("",)
    if name in COMPILING and features not in few:
        pytest.skip("compiles for every kind: a few will do")
    call, *tensors = example(packed, dtype, dim, heads, **FEATURES[features])
    reason = BACKENDS[name].why_not(call)
    if reason:
        pytest.skip(f"{name}: {reason}")

    def formula(*leaves):
        return attention(*leaves, call)

    exact = results(formula, *(t if t is None else t.double() for t in tensors))
    stock = results(formula, *tensors)
    ours = run_backend(BACKENDS[name], call, *tensors)
    for what, a, b, c in zip(NAMES, ours, stock, exact, strict=False):
        assert_as_good_as(a, b, c, what)


@pytest.mark.filterwarnings("ignore")  # as above
def test_flex_takes_one_soft_cap_after_another():
    """What is compiled for the probe's must not turn the next one, Gemma 2's, into a number that the host reads."""
    flex = BACKENDS["flex"]
    for packed, softcap in ((False, SOFTCAP), (False, 50.0), (True, 50.0), (True, 30.0)):
        call, *tensors = example(packed, torch.bfloat16, 128, softcap=softcap)
        assert not flex.why_not(call), flex.why_not(call)
        stock = results(lambda *leaves, call=call: attention(*leaves, call), *tensors)
        for ours, theirs in zip(run_backend(flex, call, *tensors), stock, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_half_precision_needs_no_formula(packed):
    for features in ({}, {"window": 100}, {"sinks": True, "window": 100}):
        call, *_ = example(packed, torch.bfloat16, **features)
        assert choose(call).name != "plain"


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_heads_may_be_slices_of_one_tensor(packed):
    call, q, k, v, dout, _ = example(packed, torch.bfloat16, 128)
    joined = torch.cat([q, k, v], dim=2)
    sliced = joined.split((8, 2, 2), dim=2)
    expected = results(lambda q, k, v, s: attend(q, k, v, call), q, k, v, dout, None)
    leaf = joined.requires_grad_()
    out = attend(*leaf.split((8, 2, 2), dim=2), call)
    (gradient,) = torch.autograd.grad(out, leaf, dout)
    assert not sliced[0].is_contiguous()
    for ours, theirs in zip((out, *gradient.split((8, 2, 2), dim=2)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "plain"])
def test_what_a_backend_cannot_do_is_told(name):
    call, *_ = example(True, torch.bfloat16, dim=36)
    assert BACKENDS[name].why_not(call)
    assert BACKENDS[name].why_not(AttentionCall.of(torch.ones(1, 2, 2, 64), torch.ones(1, 2, 2, 64)))


def test_dense_rows_agree_with_sdpa():
    call, q, k, v, dout, _ = example(False, torch.bfloat16, 128)

    def sdpa(q, k, v, _):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.11, enable_gqa=True)
        return out.transpose(1, 2)

    ours = results(lambda q, k, v, s: attend(q, k, v, call), q, k, v, dout, None)
    stock = results(sdpa, q, k, v, dout, None)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())


def run(model, lengths, autocast=False):
    ids = torch.randint(5, tiny.VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(3)).cuda()
    where = positions(lengths)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        packed = model(input_ids=ids, position_ids=where, use_cache=False).logits
        packed.float().pow(2).mean().backward()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        alone = [model(input_ids=document, use_cache=False).logits for document in ids.split(lengths, dim=1)]
    masked = bool(read_layout(ids.shape, ids.device, where)._masks)  # the layout that the layers read
    return packed.detach().float(), torch.cat(alone, dim=1).float(), masked


FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3"]


# In half precision a router may choose another expert for a rounding's sake.
@pytest.mark.promise("F7")
@pytest.mark.parametrize(
    ("name", "how"),
    [(n, how) for n in FAMILIES for how in ("float32", "bfloat16", "autocast")] + [("gpt_oss", "float32")],
)
def test_a_packed_row_is_its_documents_alone(name, how):
    model = tiny.build_model(name, max_position_embeddings=2048).cuda()
    if how == "bfloat16":
        model = model.bfloat16()
    patches = apply_fused_parts(model, find_family(model.config), PatchSet())
    swapped = [change for change in patches.report() if change.what.endswith("FusedRMSNorm")]
    assert sum(isinstance(m, FusedRMSNorm) for m in model.modules()) == len(swapped) > 0
    packed, alone, masked = run(model, (70, 1, 33, 12), autocast=how == "autocast")
    tolerance = 1e-5 if how == "float32" else 0.03 * alone.abs().max().item()
    assert (packed - alone).abs().max().item() <= tolerance
    if name != "gemma2":  # its soft-cap needs a backend that not every machine has
        assert not masked


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


def test_backends_are_tried_while_weights_are_loaded(tmp_path):
    """The first step finds them tried: loading libraries and comparing results took seconds of it."""
    folder = tiny.save_checkpoint(tmp_path, "llama")
    probe.failure.cache_clear()
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_16bit=True)
    before = probe.failure.cache_info().misses
    assert before > 0
    ids = torch.arange(5, 45, device="cuda")[None]
    model = FastLanguageModel.get_peft_model(model, r=4).train()
    for positions in (None, torch.arange(40, device="cuda").remainder(9)[None]):
        model(ids, labels=ids, position_ids=positions).loss.backward()
    assert probe.failure.cache_info().misses == before
