"""Predicted memory: its parts are what a step really makes."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pantheraml import FastLanguageModel
from pantheraml.devices.peak_memory import Outliving
from pantheraml.models.memory_estimate import (
    MemoryEstimate,
    Share,
    describe,
    predicted_bytes,
    weight_bytes,
)
from pantheraml.models.recompute import set_recompute
from pantheraml.models.recompute_plan import (
    RecomputePlan,
    kept_bytes,
    kept_per_token,
    passing_bytes,
    sizes_of,
)
from tests import tiny
from tests.live_bytes import LiveBytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("model"), "llama")
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    return FastLanguageModel.get_peft_model(model, r=4)


@pytest.mark.parametrize(
    ("optim", "build"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_gradients_and_moments_are_those_of_a_step(model, optim, build):
    predicted = predicted_bytes(model, 8, RecomputePlan(8, 0), optim, outliving=Outliving(sums=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build(trained, lr=1e-3)
    model(input_ids=torch.arange(8)[None] + 5, labels=torch.arange(8)[None] + 5).loss.backward()
    optimizer.step()
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    ]
    assert predicted.gradients == predicted.trainable == sum(p.grad.nbytes for p in trained) > 0
    assert predicted.optimizer == sum(moment.nbytes for moment in moments)
    assert (predicted.optimizer > 0) == (optim != "sgd")


def test_eight_bit_moments_take_a_byte(model):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert predicted_bytes(model, 8, RecomputePlan(8, 0), "paged_adamw_8bit").optimizer == 2 * trained


def test_weights_are_what_lies_there(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    assert weight_bytes(model) == sum(tensor.nbytes for _, tensor in named)
    tied = nn.ModuleList([nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)])
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 4 * 8 * 4


def test_packed_weights_count_with_their_scales():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 128, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = layer.weight.quant_state
    parts = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert layer.weight.nbytes == 64 * 128 // 2
    assert weight_bytes(layer) == sum(part.nbytes for part in parts)


def test_activations_follow_the_plan(model):
    kept, layers = kept_per_token(model), model.config.num_hidden_layers

    def activations(tokens, *plan):
        found = predicted_bytes(model, tokens, RecomputePlan(tokens, *plan), outliving=Outliving(sums=True))
        return found.activations + found.passing + found.logits

    assert activations(64, 0) == 64 * layers * kept.all + passing_bytes(model, 64)
    assert activations(64, 1) == 64 * (kept.attended + (layers - 1) * kept.all) + passing_bytes(model, 64)
    every = passing_bytes(model, 64, recomputes=True)
    assert activations(64, layers, "input") == 64 * layers * kept.input + every


def test_layers_keep_what_is_predicted(model):
    """What autograd really holds for a batch, weights left out."""
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = model.base_model.model.model(input_ids=torch.arange(128).view(2, 64))
    for tensor in (*model.parameters(), *model.buffers()):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    assert output.last_hidden_state.requires_grad
    layers, last = kept_bytes(model, RecomputePlan(128, 0), 128), 2 * 128 * 64 * 4
    assert layers < sum(held.values()) < layers + last, "beside the layers', what the final norm keeps"


def test_layers_of_transformers_keep_what_is_predicted_in_16_bits():
    """Of a frozen linear nothing is kept but PEFT's copy of what goes into it. On CPUs norms compute in float32."""
    held = {}
    for layers, tokens in itertools.product((1, 2), (64, 128)):
        model = tiny.build_model("llama", num_hidden_layers=layers, hidden_size=128).to(torch.bfloat16)
        model.requires_grad_(False)
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        sizes = sizes_of(adapted)
        found = {}

        def hold(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            model.model(input_ids=torch.arange(5, 5 + tokens)[None])
        held[layers, tokens] = sum(one.untyped_storage().nbytes() for one in found.values())
    of_two, of_one = (held[layers, 128] - held[layers, 64] for layers in (2, 1))
    in_float32 = 2 * (4 - 2) * sizes.hidden + 2 * 4
    assert (of_two - of_one) / 64 == pytest.approx(sizes.kept.all + in_float32, rel=0.01)


def test_the_sum_and_its_words():
    found = MemoryEstimate(
        weights=15 * 2**30, gradients=160 * 2**20, optimizer=320 * 2**20, activations=3000, slack=5, driver=7
    )
    assert found.total == 15 * 2**30 + 480 * 2**20 + 3000
    assert found.reserved == found.total + 12 == sum(found.parts().values())
    assert describe(found) == "15.0 GiB weights + 160 MiB gradients + 320 MiB optimizer + 3 KiB activations"


def test_shares_of_a_split_model():
    """Layers on two devices, one of which is not there: each has its own, in as many copies as are in flight."""
    model = tiny.build_model("llama", num_hidden_layers=4)
    plan, keeps = RecomputePlan(8, 0), dict(outliving=Outliving(sums=True))
    whole = predicted_bytes(model, 8, plan, **keeps)
    there = torch.device("meta")
    for part in (*model.model.layers[1:], model.model.norm, model.lm_head):
        part.to(there)
    first = predicted_bytes(model, 8, plan, share=Share(torch.device("cpu"), 1, 2.0, has_head=False), **keeps)
    second = predicted_bytes(model, 8, plan, share=Share(there, 3, 1.0, has_head=True), **keeps)
    for part in ("gradients", "optimizer", "trainable"):
        assert getattr(first, part) + getattr(second, part) == getattr(whole, part)
    here = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device != there]
    assert first.weights + first.trainable == sum(tensor.nbytes for tensor in here)
    one = kept_bytes(model, plan, 8, layers=1)
    assert (first.activations, first.passing) == (2 * one, passing_bytes(model, 8, head=False))
    assert second.activations == 3 * one and second.passing + second.logits == passing_bytes(model, 8)
    nothing = predicted_bytes(model, 8, plan, share=Share(there, 0, 1.0, has_head=True), **keeps)
    assert (
        nothing.activations == 0 and nothing.weights + nothing.trainable == second.weights + second.trainable
    )


def test_autocast_copies_masters_for_layers_that_recompute_until_the_forward_is_over():
    """And for others until their backward; the copy of the head is the next one's."""
    there = []
    for recomputes in (False, True):
        model = tiny.build_model("llama", num_hidden_layers=3).train()
        set_recompute(model, recomputes)
        ids = torch.arange(4)[None] + 5
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state
            within = live.now
        there.append((within, live.now, hidden))
    sizes = [p.numel() for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
    copies = 2 * sum(sizes)
    (_, kept, _), (within, left, _) = there
    assert copies == within - left < kept - left
