"""Which layers recompute their activations, so that a batch fits into the memory that is free.

A layer keeps everything, or its input and what the attention gave ("attended"), or its input alone ("input"); what it
keeps lies on the GPU or in host memory. The plan takes the cheapest mixture that fits: as many layers as possible keep
everything; then all recompute; then what they keep moves to the host; then attention is computed again too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pantheraml.devices.memory import GIB
from pantheraml.devices.peak_memory import WORKSPACE_BYTES
from pantheraml.models.activation_sizes import TILE, ActivationSizes, Kept, activation_sizes
from pantheraml.models.families import find_family
from pantheraml.models.sharded_linear import tensor_group_of
from pantheraml.models.sharding import gathered_bytes
from pantheraml.models.stack_memory import missing_bytes, shared_bytes
from pantheraml.models.state import get_state

if TYPE_CHECKING:
    from torch import nn

    from pantheraml.models.fused.layer_function import Keep

# Of the free memory, what a step may take by these estimates; the rest is for the allocator's gaps.
FREE_SHARE = 0.9
# Of the free host memory, likewise.
HOST_SHARE = 0.7
# Of the model's own bytes, what an MLP may take that is computed in tiles to save memory: 8,192 tokens of the 8B Llama
# in 16 bits, 2,048 in 4 (3 % slower than 4,096, 0.2 GiB less).
_TILE_SHARE = 1 / 16
# And of what is kept in host memory, what may be on the GPU on its way: q, k and v too of the 8B Llama in 16 bits (0.9
# of 15 GiB for 8,192 tokens), but not in 4 (0.9 of 5.5).
_FLIGHT_SHARE = 1 / 12
# Layers whose tensors are on the GPU while they lie in host memory, too: in use, leaving or coming back.
_IN_FLIGHT = 3

_KEPT_WORDS = {
    "projected": "q, k, v, attention's output and the sum after it",
    "attended": "attention's output",
    "input": "their inputs",
}


@dataclass(frozen=True)
class RecomputePlan:
    """What the layers of a model do.

    Attributes:
        tokens: the largest batch it holds for.
        layers: how many recompute, the first ones.
        keep: what those keep.
        stored: how many of those keep it in host memory, the first ones.
        need: bytes that all layers keep on the GPU, by the estimate.
        free: bytes that were free for it.
        host: bytes kept in host memory.
        tile: tokens computed at a time where layers recompute; 0 for the usual number.
        unpacked: how many layers, counted from the first, keep their 4-bit weights in 16 bits, too.
    """

    tokens: int
    layers: int
    keep: Keep = "attended"
    stored: int = 0
    need: int = 0
    free: int = 0
    host: int = 0
    tile: int = 0
    unpacked: int = 0

    def describe(self, total: int) -> str:
        """One clause for the log; ``total`` is the number of layers."""
        if not self.layers:
            what = "no layer recomputes"
        else:
            what = f"{self.layers} of {total} layers recompute all but {_KEPT_WORDS[self.keep]}"
        if self.stored:
            what += f", {self.stored} keep {self.host / GIB:.1f} GiB in host memory"
        free = f" of {self.free / GIB:.1f} GiB free" if self.free else " GiB stay on the GPU"
        return f"{what} ({self.tokens} tokens at a time: {self.need / GIB:.1f}{free})"


def sizes_of(model: Any) -> ActivationSizes:
    """What activations of ``model`` (or its backbone) take, as it is now."""
    family = find_family(model.config)
    first = next(
        (p for name, p in model.named_parameters() if name.endswith("layers.0.self_attn.o_proj.weight")), None
    )
    fused, trained_in, size = _fused_layers(model), 0, model.dtype.itemsize
    if first is not None and first.requires_grad:
        # The trainer computes in 16 bits on GPUs, whatever masters are in.
        trained_in = min(first.itemsize, 2) if first.device.type == "cuda" else first.itemsize
        state = get_state(model)
        sharding = None if state is None else state.sharding
        if sharding is not None and sharding.compute_dtype is not None:
            # Shares of masters; the residual stream is as they are gathered.
            trained_in = size = sharding.compute_dtype.itemsize
    group = tensor_group_of(model)
    return activation_sizes(
        model.config,
        size,
        is_fused=bool(fused),
        has_head_norms=any(name.endswith("self_attn.q_norm") for name, _ in model.named_modules()),
        has_post_norms=family is not None and "sandwich_norm" in family.deviations,
        rank=_rank_of(model),
        trained_in=trained_in,
    ).cut(1 if group is None else group.size)


def _rank_of(model: nn.Module) -> int:
    """The rank of the adapters of ``model``; 0 where it has none."""
    found = (p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name and p.dim() == 2)
    return next(found, 0)


def kept_per_token(model: Any) -> Kept:
    """Bytes that a layer of ``model`` (or its backbone) keeps for a token, by what it keeps; an upper estimate."""
    return sizes_of(model).kept


def kept_bytes(
    model: Any, plan: RecomputePlan, tokens: int, *, layers: int | None = None, in_flight: float = 1
) -> int:
    """Bytes that all layers (or ``layers`` of them) keep on the GPU for ``tokens`` under ``plan``."""
    total, kept = _num_layers(model) if layers is None else layers, kept_per_token(model)
    there = plan.layers - plan.stored + min(plan.stored, _IN_FLIGHT)
    size = there * getattr(kept, plan.keep) + (total - plan.layers) * kept.all
    return int(size * tokens * in_flight)


def passing_bytes(model: Any, tokens: int, *, head: bool = True, recomputes: bool = False) -> int:
    """Bytes that come and go beside what is kept: those of the head, or of one layer, whichever are more."""
    sizes = sizes_of(model)
    return max(sizes.layer_passing(tokens, recomputes=recomputes), sizes.head_passing(tokens) if head else 0)


def plan_recompute(
    model: Any, tokens: int, free: int, host_free: int = 0, *, layers: int | None = None, in_flight: float = 1
) -> RecomputePlan:
    """The cheapest plan for ``tokens`` at a time.

    Args:
        model: a causal language model or its backbone.
        tokens: tokens of the batch, padding included.
        free: bytes free on the GPU for activations.
        host_free: bytes of host memory that may be taken; 0 keeps everything on the GPU.
        layers: how many are on the GPU; None is all.
        in_flight: batches whose activations are held at a time.
    """
    total = _num_layers(model) if layers is None else layers
    sizes = sizes_of(model)
    beside = _not_there_yet(model, sizes)
    kept, gathered = sizes.kept, gathered_bytes(model)

    def around(*, recomputes: bool = False, attends: bool = False) -> int:
        layer = sizes.layer_passing(tokens, recomputes=recomputes, attends=attends)
        return max(layer + gathered.last, sizes.head_passing(tokens) + gathered.head)

    usable = int(FREE_SHARE * free) - beside
    room = usable - around()
    held = int(tokens * in_flight)
    whole, attended, alone = held * kept.all, held * kept.attended, held * kept.input
    if total * whole <= room:
        return RecomputePlan(tokens, 0, need=total * whole, free=free)
    saved = whole - attended
    count = -(-(total * whole - room) // saved)
    if count < total:
        return RecomputePlan(tokens, count, need=count * attended + (total - count) * whole, free=free)
    room = usable - around(recomputes=True)
    if total * attended <= room:
        return RecomputePlan(tokens, total, need=total * attended, free=free)
    last_resorts: tuple[tuple[Keep, int], ...] = (("attended", attended), ("input", alone))
    for keep, size in last_resorts:
        room = usable - around(recomputes=True, attends=keep == "input")
        over = total * size - room
        stored = -(-over // size) + _IN_FLIGHT if over > 0 else 0
        if stored <= total and stored * size <= HOST_SHARE * host_free:
            need = (total - stored + min(stored, _IN_FLIGHT)) * size
            return RecomputePlan(tokens, total, keep, stored, need, free, stored * size)
    # Nothing fits by the estimate: the least that can be tried.
    return RecomputePlan(tokens, total, "input", 0, total * alone, free)


def most_tokens(model: Any, free: int) -> int:
    """The largest batch, in tokens, that needs no recompute in ``free`` bytes; 0 when not even one token fits."""
    low, high = 0, 2**24
    while low < high:
        middle = (low + high + 1) // 2
        if plan_recompute(model, middle, free).layers == 0:
            low = middle
        else:
            high = middle - 1
    return low


def offload_plan(
    model: Any, tokens: int, host_free: int, *, layers: int | None = None, in_flight: float = 1
) -> RecomputePlan:
    """Every layer recomputes; what it keeps lies in host memory: as much as fits there and is little on its way.

    Arguments as in ``plan_recompute``.
    """
    total = _num_layers(model) if layers is None else layers
    kept = kept_per_token(model)
    room, here, held = (
        HOST_SHARE * host_free,
        min(total, _IN_FLIGHT) * tokens,
        int(total * tokens * in_flight),
    )
    keep, size = "input", kept.input
    if held * kept.attended <= room:
        keep, size = "attended", kept.attended
    small = here * kept.projected <= _FLIGHT_SHARE * _model_bytes(model)
    if small and held * kept.projected <= room:
        keep, size = "projected", kept.projected
    return RecomputePlan(tokens, total, keep, total, here * size, host=held * size, tile=_small_tile(model))


def _fused_layers(model: Any) -> list[Any]:
    from pantheraml.models.fused import FusedDecoderLayer

    return [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]


def _not_there_yet(model: Any, sizes: ActivationSizes) -> int:
    """Bytes that the first step takes for good: margins of stacks, FP8 twins, buffers that layers share, workspace.
    Later plans count the last two once more, a few hundred MiB.
    """
    layers = _fused_layers(model)
    if not layers or model.device.type != "cuda":
        return 0
    return missing_bytes(layers, sizes) + shared_bytes(layers, sizes) + WORKSPACE_BYTES


def _num_layers(model: Any) -> int:
    return model.config.get_text_config().num_hidden_layers


def unpacked_bytes(layer: nn.Module) -> int:
    """Bytes that the 4-bit weights of a fused layer take in 16 bits."""
    states = (getattr(weight, "quant_state", None) for weight in layer.parameters())
    return sum(math.prod(state.shape) * state.dtype.itemsize for state in states if state is not None)


def plan_unpacked(
    model: Any, plan: RecomputePlan, free: int, layers: list[Any], in_flight: float = 1
) -> RecomputePlan:
    """``plan`` with as many layers kept unpacked as there is memory for beside what it needs.

    Args:
        model: as in ``plan_recompute``.
        plan: what recomputes, and for how many tokens.
        free: bytes free on the device, those of layers that are unpacked now included.
        layers: those of the device.
        in_flight: as in ``plan_recompute``.
    """
    from pantheraml.models.fused import FusedDecoderLayer

    sizes = [unpacked_bytes(layer) for layer in layers if isinstance(layer, FusedDecoderLayer)]
    if not any(sizes):
        return plan
    need = kept_bytes(model, plan, plan.tokens, layers=len(layers), in_flight=in_flight)
    passing = passing_bytes(model, plan.tokens, recomputes=plan.layers == len(layers))
    room = int(FREE_SHARE * free) - passing - need
    # The margins of the factors are a few columns more than the weights.
    return replace(plan, unpacked=min(len(sizes), max(0, int(room / (1.05 * max(sizes))))))


def _model_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _small_tile(model: Any) -> int:
    """Tokens of which an MLP's intermediates (gate, up, value and its gradient) are small beside the model."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    room = _TILE_SHARE * _model_bytes(model)
    tokens = int(room / (4 * inner * max(model.dtype.itemsize, 2)))
    return min(max(1 << tokens.bit_length() - 1 if tokens else 0, 1024), TILE)
