"""What fused layers keep and hold, tensor by tensor, is what the estimates say."""

from __future__ import annotations

import gc

import pytest
import torch

from pantheraml.devices.estimate import Work, estimate
from pantheraml.devices.layout import Layout
from pantheraml.kernels import workspace
from pantheraml.kernels.workspace import release_buffers
from pantheraml.models.activation_sizes import TILE
from pantheraml.models.fp8 import keep_turned
from pantheraml.models.fused import fp8_stack, stack
from pantheraml.models.memory_estimate import predicted_bytes
from pantheraml.models.precision import Precision
from pantheraml.models.recompute_plan import RecomputePlan, sizes_of
from pantheraml.models.stack_memory import beside_bytes, missing_bytes, shared_bytes
from pantheraml.models.weight_sizes import measure_parts
from tests.fused.test_decoder_layer import FAMILIES, MIXTURES
from tests.fused.test_fp8_layer import in_fp8
from tests.fused.test_trained_layer import build_trained
from tests.fused.test_whole_layer import build_whole

TOKENS = 24
DENSE = [family for family in FAMILIES if family not in MIXTURES]


def kept_bytes(model, backbone, held_before):
    """Bytes that autograd holds after a forward of the backbone, weights left out."""
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("keep", ["all", "projected", "attended", "input"])
def test_a_layer_keeps_what_is_counted(family, keep, trained):
    """The difference between a model of two layers and one of one; on a CPU attention keeps its own log-sum-exp."""
    found = []
    for count in (1, 2):
        torch.manual_seed(0)
        model = build_trained(family, keep, TILE) if trained else build_whole(family, keep)[0]
        backbone = model.model if trained else model.get_base_model().model
        del backbone.layers[count:]
        kept, _ = kept_bytes(model, backbone, storages)
        found.append(kept)
    sizes = sizes_of(model)
    assert sizes.computes_fused and sizes.is_trained == trained
    counted = TOKENS * getattr(sizes.kept, keep)
    assert found[1] - found[0] == pytest.approx(counted, rel=0.03)


def test_margins_are_there_after_a_forward_and_counted_before_it():
    model, layers = build_whole("llama", "all")
    before, sizes = storages(model), sizes_of(model)
    counted = beside_bytes(layers, sizes)
    assert missing_bytes(layers, sizes) == counted
    model.get_base_model().model(input_ids=torch.arange(5, 5 + TOKENS)[None], use_cache=False)
    assert sum(storages(model).values()) - sum(before.values()) == counted > 0
    assert beside_bytes(layers, sizes) == missing_bytes(layers, sizes) == 0


def test_fp8_weights_count_with_their_twins_before_they_are_there_and_after():
    """Plan and prediction agree, before a step, after its forward and after its backward."""
    model, layers = build_whole("llama", "all", r=16)
    keep_turned(in_fp8(model).get_base_model())
    config, sizes = model.get_base_model().config, sizes_of(model)
    parts = measure_parts(config, Precision("fp8", torch.float32), rank=16)
    assert parts is not None and parts.activations == sizes
    planned = estimate(parts, Layout("none"), Work(TOKENS))[0].weights

    def predicted():
        return predicted_bytes(model, TOKENS, RecomputePlan(TOKENS, 0)).weights

    before = predicted()
    assert before == planned
    output = model(input_ids=torch.arange(5, 5 + TOKENS)[None])
    assert predicted() == before and 0 < missing_bytes(layers, sizes) < before
    output.logits.sum().backward()
    # Nobody asks for the gradient of the first layer's input, nor makes the turned weights for it.
    assert predicted() == before and missing_bytes(layers, sizes) == 0
    assert [
        sum(one._memory._turned is None for one in layer.reader._stacks.values()) for layer in layers
    ] == [1, 0]


def test_weights_that_only_pass_take_buffers_that_are_counted():
    """Those of one layer, whatever their number; of FP8, also the largest stack turned."""
    for is_fp8 in (False, True):
        gc.collect()  # what other tests shared
        model, layers = build_whole("llama", "all")
        model = in_fp8(model) if is_fp8 else model
        for layer in layers:
            layer.reader.is_passing = True
        before, sizes = storages(model), sizes_of(model)
        release_buffers()
        ids = torch.arange(5, 5 + TOKENS)[None]
        model.get_base_model().model(input_ids=ids, use_cache=False)[0].sum().backward()
        assert storages(model) == before and beside_bytes(layers, sizes) == 0
        counted = shared_bytes(layers, sizes)
        if is_fp8:
            rooms = {one for room in fp8_stack._shared.values() for one in (room.matrix, room.a, room.b)}
            turned = max(one.nbytes for one in workspace._buffers.values())
            scales = 4 * sum(one.rows for one in sizes.stacks)
            assert sum(one.nbytes for one in rooms) + turned + scales == counted
        else:
            assert sum(buffer.matrix.nbytes for buffer in stack._shared.values()) == counted
