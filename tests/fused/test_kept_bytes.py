"""What fused layers keep and hold, tensor by tensor, is what the estimates say."""

from __future__ import annotations

import gc

import pytest
import torch

from pantheraml.kernels import workspace
from pantheraml.kernels.workspace import release_buffers
from pantheraml.models.fused import fp8_stack, stack
from pantheraml.models.recompute_plan import sizes_of
from pantheraml.models.stack_memory import margin_bytes, shared_bytes
from tests.fused.test_decoder_layer import FAMILIES, MIXTURES
from tests.fused.test_fp8_layer import in_fp8
from tests.fused.test_whole_layer import build_whole

TOKENS = 24
DENSE = [family for family in FAMILIES if family not in MIXTURES]


def kept_bytes(model, held_before):
    """Bytes that autograd holds after a forward of the backbone, weights left out."""
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    backbone = model.get_base_model().model
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = backbone(input_ids=torch.arange(5, 5 + TOKENS).reshape(2, -1), use_cache=False)
    for place in held_before(model):
        held.pop(place, None)
    return sum(held.values()), output


def storages(model):
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("keep", ["all", "projected", "attended", "input"])
def test_a_layer_keeps_what_is_counted(family, keep):
    """The difference between a model of two layers and one of one; on a CPU attention keeps its own log-sum-exp."""
    found = []
    for count in (1, 2):
        torch.manual_seed(0)
        model, layers = build_whole(family, keep)
        stack = model.get_base_model().model.layers
        del stack[count:]
        kept, _ = kept_bytes(model, storages)
        found.append(kept)
    sizes = sizes_of(model)
    assert sizes.is_fused and not sizes.is_trained and len(layers) >= 2
    counted = TOKENS * getattr(sizes.kept, keep)
    assert found[1] - found[0] == pytest.approx(counted, rel=0.03)


def test_margins_are_there_after_a_forward_and_counted_before_it():
    model, layers = build_whole("llama", "all")
    before, sizes = storages(model), sizes_of(model)
    counted = margin_bytes(layers, sizes)
    model.get_base_model().model(input_ids=torch.arange(5, 5 + TOKENS)[None], use_cache=False)
    assert sum(storages(model).values()) - sum(before.values()) == counted > 0
    assert margin_bytes(layers, sizes) == 0


def test_weights_that_only_pass_take_buffers_that_are_counted():
    """Those of one layer, whatever their number; of FP8, also the largest stack turned."""
    for is_fp8 in (False, True):
        gc.collect()  # what other tests shared
        model, layers = build_whole("llama", "all")
        model = in_fp8(model) if is_fp8 else model
        for layer in layers:
            layer.reader.is_passing = True
        before, sizes = storages(model), sizes_of(model)
        assert margin_bytes(layers, sizes) == 0
        release_buffers()
        model.get_base_model().model(input_ids=torch.arange(5, 5 + TOKENS)[None], use_cache=False)[
            0
        ].sum().backward()
        assert storages(model) == before
        if is_fp8:
            rooms = {
                tensor for room in fp8_stack._shared.values() for tensor in (room.matrix, room.a, room.b)
            }
            taken = sum(tensor.nbytes for tensor in rooms) + max(
                one.nbytes for one in workspace._buffers.values()
            )
            assert 0.8 * shared_bytes(layers, sizes) < taken <= shared_bytes(layers, sizes)
        else:
            taken = sum(buffer.matrix.nbytes for buffer in stack._shared.values())
            assert taken == shared_bytes(layers, sizes)
