"""What comes and goes around a fused layer is what the estimate counts: every tensor that lives meanwhile."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.kernels.attention.plain import Plain
from pantheraml.models.fused import adapter_inputs, halves, stack
from pantheraml.models.recompute_plan import sizes_of
from tests.fused import test_decoder_layer as layers_of
from tests.fused.test_whole_layer import build_whole

TOKENS = 300
# An MLP so wide that nothing else is the most that comes and goes.
WIDE = dict(hidden_size=256, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4)
KERNELS = {
    halves: [
        *("add_norm", "norm_backward", "rms_norm_into", "rotate_qkv_", "rotate_qkv_back"),
        *("glu_forward", "glu_backward"),
    ],
    stack: ["rms_norm_into", "transposed_product"],
    adapter_inputs: ["transposed_product"],
    Plain: ["forward", "backward"],
}


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that have a row for each token and live; within a kernel nothing is counted, since
    what plain PyTorch makes there on a CPU is not what the kernel makes on a GPU.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = self.hidden = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result

    def see(self, found):
        if isinstance(found, tuple | list):
            for one in found:
                self.see(one)
        elif isinstance(found, torch.Tensor) and not self.hidden and TOKENS in found.shape[:2]:
            storage = found.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known and size:
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.fixture
def living(monkeypatch):
    mode = Living()

    def closed(kernel):
        @functools.wraps(kernel)
        def call(*args, **kwargs):
            mode.hidden += 1
            try:
                found = kernel(*args, **kwargs)
            finally:
                mode.hidden -= 1
            mode.see(found)
            return found

        return call

    for place, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(place, name, closed(getattr(place, name)))
    return mode


@pytest.mark.parametrize("keep", ["all", "attended", "input"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_most_that_lives_is_what_is_kept_and_what_passes(family, keep, living, monkeypatch):
    monkeypatch.setattr(layers_of, "SIZES", WIDE)
    model, _ = build_whole(family, keep, r=16)
    backbone = model.get_base_model().model
    del backbone.layers[1:]  # the last layer is the first, whose input has a gradient
    states = torch.randn(1, TOKENS, WIDE["hidden_size"], requires_grad=True)
    backbone(inputs_embeds=states, use_cache=False).last_hidden_state.sum().backward()  # weights move
    with living:
        output = backbone(inputs_embeds=states, use_cache=False).last_hidden_state
        gradient = torch.zeros_like(output)
        output.backward(gradient)
    sizes = sizes_of(model)
    kept = TOKENS * getattr(sizes.kept, keep)
    passing = sizes.layer_passing(TOKENS, recomputes=keep != "all", attends=keep == "input")
    # Cosines and sines, which the layers share; and the output and its gradient, which this test holds in the backward.
    beside = 4 * sizes.queries // sizes.heads + (2 * sizes.hidden if keep != "attended" else 0)
    beside *= TOKENS * sizes.size
    assert living.most == pytest.approx(kept + passing + beside, rel=0.03)
