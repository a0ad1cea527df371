"""``keep_dequantized``: 4-bit weights that stay unpacked give the same numbers, and give their memory back."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError
from pantheraml.kernels.unpack_table import UnpackTable
from pantheraml.models import recompute
from pantheraml.models.families import find_family
from pantheraml.models.fused import stack as stacks
from pantheraml.models.fused.decoder_layer import apply_layers
from pantheraml.models.patching import PatchSet
from pantheraml.models.recompute_plan import plan_unpacked, unpacked_bytes
from pantheraml.models.state import get_state
from tests import tiny

pytest.importorskip("bitsandbytes")

FLAGS = dict(max_seq_length=64, load_in_4bit=True, device_map="cpu")


@pytest.fixture
def unpacked(monkeypatch):
    """How many weights were unpacked."""
    count = []
    original = UnpackTable.write
    monkeypatch.setattr(UnpackTable, "write", lambda table: count.extend(table._parts) or original(table))
    return count


def build(folder, **flags):
    tiny.save_checkpoint(folder, "llama")
    model, _ = FastLanguageModel.from_pretrained(str(folder), **FLAGS, **flags)
    model = FastLanguageModel.get_peft_model(model, r=4)
    base = model.get_base_model()
    apply_layers(base, find_family(base.config), PatchSet(), on_cpu=True)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def run(model):
    ids = torch.arange(5, 37).reshape(2, 16)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def fused_layers(model):
    return list(model.get_base_model().model.layers)


def test_a_step_unpacks_nothing_and_computes_the_same(tmp_path, unpacked):
    usual, kept = build(tmp_path / "a").train(), build(tmp_path / "b", keep_dequantized=True).train()
    want = run(usual)
    assert len(unpacked) > 0
    run(kept)
    assert all(layer.reader.keeps_unpacked for layer in fused_layers(kept))
    del unpacked[:]
    found = run(kept)
    assert not unpacked
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_a_weight_that_changes_is_unpacked_again(tmp_path, unpacked):
    model = build(tmp_path, keep_dequantized=True).train()
    before = run(model)[0]
    weight = fused_layers(model)[0].self_attn.q_proj.base_layer.weight
    weight.data = torch.roll(weight.data, 1, 0)
    del unpacked[:]
    assert run(model)[0] != before
    assert len(unpacked) == 3  # q, k and v lie in one stack


def test_memory_is_given_back_when_a_longer_batch_needs_it(tmp_path, monkeypatch):
    model = build(tmp_path, keep_dequantized=True).train()
    run(model)
    state, layers = get_state(model), fused_layers(model)
    assert state.plans[0].unpacked == len(layers)
    held = [layer.reader._stacks["qkv"]._buffer for layer in layers]
    assert len({id(buffer) for buffer in held}) == len(layers)
    monkeypatch.setattr(recompute.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 0}))
    long = torch.ones(2, 32, dtype=torch.long)
    model(input_ids=long, labels=long)
    assert state.plans[0].unpacked == 0
    shared = {id(layer.reader._stacks["qkv"]._buffer) for layer in layers}
    assert len(shared) == 1 and all(buffer not in held for buffer in stacks._shared.values())


def test_inference_takes_no_memory_for_it(tmp_path):
    model = build(tmp_path, keep_dequantized=True).train()
    run(model)
    FastLanguageModel.for_inference(model)
    assert not any(layer.reader.keeps_unpacked for layer in fused_layers(model))
    FastLanguageModel.for_training(model)
    run(model)
    assert all(layer.reader.keeps_unpacked for layer in fused_layers(model))


def test_as_many_layers_as_there_is_memory_for(tmp_path):
    model = build(tmp_path, keep_dequantized=True).train()
    run(model)
    plan, layer = get_state(model).plans[0], fused_layers(model)[0]
    config = model.config
    heads = (config.num_attention_heads + config.num_key_value_heads) * layer.self_attn.head_dim
    weights = config.hidden_size * (2 * heads + 3 * config.intermediate_size)
    assert unpacked_bytes(layer) == weights * 4  # float32 on a CPU
    counts = [
        plan_unpacked(model, plan, free, fused_layers(model)).unpacked for free in range(0, 2**24, 2**16)
    ]
    assert counts == sorted(counts) and set(counts) == set(range(config.num_hidden_layers + 1))


@pytest.mark.parametrize("flags", [dict(load_in_4bit=False), dict(kernels="off")])
def test_where_nothing_is_dequantised_it_is_refused(tmp_path, flags):
    tiny.save_checkpoint(tmp_path, "llama")
    with pytest.raises(
        ConfigError, match=r"keep_dequantized=True (was given for weights in plain|and kernels)"
    ):
        FastLanguageModel.from_pretrained(str(tmp_path), **{**FLAGS, **flags}, keep_dequantized=True)


def test_layers_that_are_not_fused_say_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(recompute, "say", said.append)
    tiny.save_checkpoint(tmp_path, "llama")
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), **FLAGS, keep_dequantized=True)
    run(FastLanguageModel.get_peft_model(model, r=4).train())
    assert [
        line for line in said if "keep_dequantized: 0 layers" in line and "none is computed by fused" in line
    ]
