"""The attention implementation "pantheraml" in real models on CPU."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from pantheraml.kernels.attention import layout as layout_file
from pantheraml.kernels.attention import read_layout
from pantheraml.models.families import find_family
from pantheraml.models.fused import apply_attention, apply_fused_parts
from pantheraml.models.patching import PatchSet
from tests import tiny

# Windows of 16 tokens and documents longer than that.
LENGTHS = (21, 3, 40, 1, 18)
FAMILIES = list(tiny.FAMILIES)
CPU = torch.device("cpu")


def build(name, **overrides):
    # Gemma 2 with a soft-cap that bites at the logits of a tiny model
    if name == "gemma2":
        overrides.setdefault("attn_logit_softcapping", 0.05)
    model = tiny.build_model(name, **overrides)
    if name == "gpt_oss":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.normal_()
    return model


def stock_of(model):
    """The same model as transformers computes it, with soft-cap and sinks."""
    stock = copy.deepcopy(model)
    if model.config.model_type in ("gemma2", "gpt_oss"):
        stock.config._attn_implementation = "eager"
    return stock


def patched(model):
    patches = apply_attention(model, find_family(model.config), PatchSet())
    assert model.config._attn_implementation == "pantheraml"
    return model, patches


def recompute(model):
    """Recompute every layer in the backward pass; transformers 5.23 calls it by another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def packed(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(5, tiny.VOCAB, (1, n), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return documents, torch.cat(documents, dim=1), positions


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_is_its_documents_alone(name):
    model = build(name)
    stock = stock_of(model)
    patched(model)
    documents, row, positions = packed()
    with torch.no_grad():
        alone = torch.cat([stock(input_ids=d, use_cache=False).logits for d in documents], dim=1)
        together = model(input_ids=row, position_ids=positions, use_cache=False).logits
        # what every token may see matters: without document borders the numbers are others
        leaking = model(input_ids=row, use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (leaking - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_gradients_of_a_packed_row_are_those_of_its_documents(name):
    model = build(name)
    stock = stock_of(model)
    patched(model)
    documents, row, positions = packed()
    sum(stock(input_ids=d, use_cache=False).logits.pow(2).sum() for d in documents).backward()
    recompute(model)
    model.train()(input_ids=row, position_ids=positions, use_cache=False).logits.pow(2).sum().backward()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * max(scale, 1), msg=key)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "ones", "right", "left"])
def test_dense_batches_equal_stock_bitwise(name, padding):
    model = build(name)
    stock = stock_of(model)
    patched(model)
    ids = torch.randint(5, tiny.VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = {"none": None}.get(padding, torch.ones_like(ids))
    if padding == "right":
        mask[1, 20:] = mask[2, 9:] = 0
    if padding == "left":
        mask[1, :4] = mask[2, :15] = 0
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (model, stock))
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert torch.equal(ours[real], theirs[real])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_equals_stock(name, cache):
    model = build(name)
    stock = stock_of(model)
    patched(model)
    ids = torch.randint(5, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    ours, theirs = (
        m.generate(ids, attention_mask=mask, eos_token_id=None, **options) for m in (model, stock)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert torch.equal(a, b)


def test_rows_of_several_documents_side_by_side():
    model = build("mistral")
    stock = stock_of(model)
    patched(model)
    (first, second, third), _, _ = packed((10, 30, 40))
    rows = torch.cat([torch.cat([first, second], 1), third])
    positions = torch.stack([torch.cat([torch.arange(10), torch.arange(30)]), torch.arange(40)])
    with torch.no_grad():
        together = model(input_ids=rows, position_ids=positions, use_cache=False).logits
        alone = [stock(input_ids=d, use_cache=False).logits for d in (first, second, third)]
    torch.testing.assert_close(together[0, :10], alone[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[0, 10:], alone[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1], alone[2][0], rtol=1e-5, atol=1e-5)


def test_offsets_of_a_collator_are_used():
    model, _ = patched(build("llama"))
    _, row, positions = packed()
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    extra = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 40, "max_length_k": 40}
    with torch.no_grad():
        expected = model(input_ids=row, position_ids=positions, use_cache=False).logits
        got = model(input_ids=row, position_ids=positions, use_cache=False, **extra).logits
    assert torch.equal(got, expected)


def test_dropout_still_drops():
    model, _ = patched(build("llama", attention_dropout=0.5))
    _, row, positions = packed()
    model.train()
    with torch.no_grad():
        first, second = (model(input_ids=row, position_ids=positions).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_an_own_mask_is_honoured():
    model = build("llama")
    stock = stock_of(model)
    patched(model)
    ids = torch.arange(12)[None] + 5
    mask = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    mask |= torch.eye(12, dtype=torch.bool)
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (model, stock))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chosen", ["eager", "flex_attention"])
def test_an_implementation_chosen_otherwise_stays(chosen):
    model = build("llama")
    model.config._attn_implementation = chosen
    patches = apply_attention(model, find_family(model.config), PatchSet())
    assert model.config._attn_implementation == chosen
    assert patches.report() == [("attention", "skipped", f"attn_implementation={chosen!r} is in use")]


def test_revert_is_bitwise():
    model = build("qwen3")
    before = model.config._attn_implementation
    _, row, positions = packed()
    with torch.no_grad():
        expected = model(input_ids=row, position_ids=positions, use_cache=False).logits
        patches = apply_fused_parts(model, find_family(model.config), PatchSet())
        patches.revert()
        assert model.config._attn_implementation == before
        assert torch.equal(model(input_ids=row, position_ids=positions, use_cache=False).logits, expected)


class TestLayout:
    def test_documents_and_masks(self):
        layout = read_layout((2, 4), CPU, torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
        assert layout.cu_seqlens.tolist() == [0, 2, 4, 8] and layout.max_seqlen == 4
        expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
        assert torch.equal(layout.mask()[0, 0], expected)
        assert torch.equal(layout.mask()[1, 0], torch.ones(4, 4).tril().bool())
        assert layout.mask(2)[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
        assert layout.mask(2) is layout.mask(2)

    @pytest.mark.parametrize(
        "positions", [None, torch.arange(6)[None], torch.arange(6).expand(3, 6), torch.ones(3, 1, 6)]
    )
    def test_no_documents(self, positions):
        layout = read_layout((3, 6), CPU, positions)
        assert layout.cu_seqlens is None and layout.max_seqlen == 6 and layout.mask().shape == (1, 1, 6, 6)

    def test_read_once_per_tensor_and_again_when_it_changes(self):
        positions = torch.arange(6)[None].clone()
        first = read_layout((1, 6), CPU, positions)
        assert read_layout((1, 6), CPU, positions) is first
        assert read_layout((2, 6), CPU, positions) is not first
        positions[0, 3:] = torch.arange(3)
        assert read_layout((1, 6), CPU, positions).cu_seqlens.tolist() == [0, 3, 6]

    def test_inference_tensors_are_read_each_time(self):
        with torch.inference_mode():
            positions = torch.arange(6)[None]
            assert read_layout((1, 6), CPU, positions).cu_seqlens is None
            positions[0, 3:] -= 3
            assert read_layout((1, 6), CPU, positions).cu_seqlens.tolist() == [0, 3, 6]

    def test_nothing_is_kept_of_a_batch_that_is_gone(self):
        positions, offsets = torch.tensor([[0, 1, 0]]), torch.tensor([0, 2, 3], dtype=torch.int32)
        layouts = [read_layout((1, 3), CPU, positions), read_layout((1, 3), CPU, positions, offsets, 2)]
        gone = [weakref.ref(layout) for layout in layouts]
        assert len(layout_file._layouts) >= 2
        del positions, offsets, layouts
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
