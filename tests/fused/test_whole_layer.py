"""A layer as one function: the same numbers whatever it keeps, wherever it keeps it, in however many tiles."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from pantheraml.models.families import find_family
from pantheraml.models.fused import decoder_layer
from pantheraml.models.fused.attention import apply_attention
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer
from pantheraml.models.fused.host_store import HostStore
from pantheraml.models.fused.layer_function import FusedLayer
from pantheraml.models.fused.stack import BoundStack
from tests.fused.test_decoder_layer import ALL, DEVICE, FAMILIES, MIXTURES, assert_equal, build, run

DENSE = tuple(family for family in FAMILIES if family not in MIXTURES)


def build_whole(family, keep, **lora):
    """A fused model in training mode whose attention is ours; the layers keep ``keep``."""
    model, patches = build(family, ALL, True, **lora)
    base = model.get_base_model()
    base.config.use_cache = False
    apply_attention(base, find_family(base.config), patches)
    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    for layer in layers:
        layer.gradient_checkpointing = keep != "all"
        layer.keep_when_recomputing = "attended" if keep == "all" else keep
    return model.train(), layers


@pytest.fixture
def whole_calls(monkeypatch):
    """The calls of the whole-layer function."""
    seen = []
    original = FusedLayer.apply
    monkeypatch.setattr(
        FusedLayer, "apply", lambda x, layer, *a: seen.append(layer) or original(x, layer, *a)
    )
    return seen


@pytest.fixture(scope="module")
def stock():
    """What the stock model computes, by family."""
    found = {}

    def get(family):
        if family not in found:
            model, _ = build(family, ALL, False)
            found[family] = run(model.train())
        return found[family]

    return get


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("keep", ["all", "projected", "attended", "input"])
@pytest.mark.parametrize("family", DENSE)
def test_it_equals_stock_whatever_it_keeps(family, keep, stored, whole_calls, stock):
    model, layers = build_whole(family, keep)
    for layer in layers:
        layer.tile = 20  # 48 tokens: two whole tiles and a short one
    if stored:
        store = HostStore(torch.device(DEVICE))
        for layer in layers:
            layer.store = store
    ours = run(model)
    assert [(call.keep, call.store is not None) for call in whole_calls] == 2 * [
        (keep, stored and keep != "all")
    ]
    assert_equal(ours, stock(family))


@pytest.mark.parametrize("keep", ["all", "projected", "attended", "input"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_documents_of_packed_rows_stay_apart(family, keep, whole_calls):
    model, _ = build_whole(family, keep)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 400, (1, 30), generator=generator).to(DEVICE)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None].to(DEVICE)
    packed = model(input_ids=ids, position_ids=positions).logits
    assert len(whole_calls) == 2 and all(call.call.packed for call in whole_calls)
    alone = [model(input_ids=part).logits for part in ids.split((11, 19), dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_nothing_is_recomputed_outside_training(whole_calls):
    model, _ = build_whole("llama", "attended")
    run(model)
    run(model.eval())
    with torch.no_grad():
        model.train()(input_ids=torch.arange(5, 9, device=DEVICE)[None])
    assert [call.keep for call in whole_calls] == 2 * ["attended"] + 4 * ["all"]


def test_a_layer_that_runs_in_parts_recomputes_too(stock, calls):
    """With another attention implementation the layer is no single function, and computed twice."""
    model, _ = build("llama", ALL, True)
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            module.gradient_checkpointing = True
    assert_equal(run(model.train()), stock("llama"))
    assert len(calls) == 4


def test_the_host_store_on_a_device_without_streams():
    store = HostStore(torch.device("cpu"))
    first, second = store.put(torch.ones(2)), store.put(torch.zeros(3), torch.ones(1))
    assert [t.tolist() for t in second.get()] == [[0, 0, 0], [1]]
    assert first.get()[0].tolist() == [1, 1]


def test_gradients_between_layers_have_room_for_the_margin_of_down(monkeypatch):
    """So down's dX is one product; whoever comes between two layers may put another gradient there."""
    widths = []
    whole = BoundStack.input_gradient

    def spied(stack, dy):
        if stack.rows < stack.cols:  # down, in the tiny model
            widths.append(dy.shape[1] - stack.rows)
        return whole(stack, dy)

    monkeypatch.setattr(BoundStack, "input_gradient", spied)
    model, layers = build_whole("llama", "all")
    plain = run(model)
    assert widths == [0, 64]

    class Doubled(torch.nn.Module):
        def forward(self, x):
            if x.requires_grad:
                x.register_hook(lambda grad: 1 * grad)
            return x

    hooks = [layer.register_forward_hook(lambda _, __, out: Doubled()(out)) for layer in layers]
    widths.clear()
    model.zero_grad()
    again = run(model)
    assert widths == [0, 0]
    assert_equal(again, plain)
    for hook in hooks:
        hook.remove()


def test_layers_share_positions_that_are_not_kept_alive(monkeypatch):
    made, before = [], decoder_layer.Rotary
    monkeypatch.setattr(decoder_layer, "Rotary", lambda *a: made.append(before(*a)) or made[-1])
    model, _ = build_whole("llama", "all")
    for count in (1, 2):
        with torch.no_grad():
            model(input_ids=torch.arange(5, 9, device=DEVICE)[None])  # one row: its cos could be a view
        assert len(made) == count
    held = [weakref.ref(rotary.cos) for rotary in made]
    made.clear()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
