"""What is tried while weights are loaded is what training then asks for."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from pantheraml.kernels.attention.table import choose
from pantheraml.models.families import find_family
from pantheraml.models.fused import attention, decoder_layer, early_attention
from pantheraml.models.fused.early_attention import coming_calls, tried_beside
from pantheraml.models.patching import PatchSet
from tests import tiny

TOKENS = 24


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_calls_are_of_the_kinds_that_training_makes(family, monkeypatch):
    model = tiny.build_model(family).train()
    found = find_family(model.config)
    decoder_layer.apply_layers(model, found, PatchSet(), on_cpu=True)
    attention.apply_attention(model, found, PatchSet())
    made = set()

    def noted(call):
        made.add(call.features)
        return choose(call)

    for module in (attention, decoder_layer):
        monkeypatch.setattr(module, "choose", noted)
    ids = torch.arange(5, 5 + TOKENS)[None]
    positions = torch.arange(TOKENS).remainder(9)[None]
    for settings in (dict(), dict(position_ids=positions)):
        model(ids, use_cache=False, **settings)
    config = model.config.get_text_config()
    calls = coming_calls(config, found, torch.float32, torch.device("cpu"), TOKENS)
    if "attention_sinks" not in found.deviations and "attention_softcap" not in found.deviations:
        assert made
    assert made <= {call.features for call in calls}
    assert len(calls) == len({call.features for call in calls})


def test_an_unknown_shape_is_left_to_the_first_step():
    config = tiny.build_model("llama").config
    family = find_family(config)
    assert coming_calls(config, family, torch.float32, torch.device("cpu"), 2) == []
    nothing = SimpleNamespace()
    assert coming_calls(nothing, family, torch.float32, torch.device("cpu"), TOKENS) == []


def test_a_thread_tries_them_beside_the_block(monkeypatch):
    tried, began = [], threading.Event()

    def noted(calls):
        began.wait(10)
        tried.extend(calls)

    monkeypatch.setattr(early_attention, "_try", noted)
    config = tiny.build_model("llama").config
    calls = coming_calls(config, find_family(config), torch.bfloat16, torch.device("cuda", 0), TOKENS)
    with tried_beside(calls):
        assert not tried
        began.set()
    assert tried == calls and len(calls) == 2
    on_cpu = coming_calls(config, find_family(config), torch.bfloat16, torch.device("cpu"), TOKENS)
    with tried_beside(on_cpu), tried_beside([]):
        pass
    assert tried == calls, "nothing is tried on a CPU"
