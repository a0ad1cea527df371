"""Weights shared out between ranks by torch's FSDP2: those of a layer are gathered while it is computed.

    frozen     the matrices of layers that an adapter leaves as they are: gathered, never reduced; the adapter, norms,
               embeddings and the head stay whole on every rank
    trained    all weights, with their gradients and the optimizer's state; computed with in 16 bits where that is asked

Every decoder layer is a group of its own, gathered before its forward and its backward and let go after them, while
the next one is on its way. Packed 4-bit weights travel as the bytes they are; their scales, a sixteenth of that, stay
on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pantheraml.config.combinations import refusal
from pantheraml.devices.gathering import Trained, frozen_gathered, trained_gathered
from pantheraml.devices.peak_memory import Gathered
from pantheraml.models.decoder_layers import layers_of
from pantheraml.models.shares import Bytes, cut, joined, whole_shape
from pantheraml.models.state import get_state


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model are shared out.

    Attributes:
        mesh: of the ranks: those that share one copy on its last axis, "fsdp" (by which PEFT knows that layers are
            computed whole), copies on the one before, if there are several.
        device: of this rank.
        trained: whether all weights are trained; else they are frozen, and what is trained is added later.
        compute_dtype: what trained weights are gathered and computed in; None: as they are held.
        offload: keep the shards of the layers in host memory.
    """

    mesh: DeviceMesh
    device: torch.device
    trained: bool
    compute_dtype: torch.dtype | None = None
    offload: bool = False

    @property
    def ranks(self) -> int:
        """How many share one copy."""
        return _ranks(self.mesh)


def _ranks(mesh: DeviceMesh) -> int:
    return mesh.size(mesh.ndim - 1)


def shard_model(model: PreTrainedModel, sharding: Sharding, dtype: torch.dtype | None = None) -> None:
    """Share out the weights of ``model``, which end on the rank's device, a layer after the other.

    Args:
        model: anywhere, on a CPU best: of weights that a file is mapped to, a rank reads what it keeps.
        sharding: how.
        dtype: what plain weights are held in, if not in what they are now.
    """
    from pantheraml.models.fused import FusedDecoderLayer

    model.requires_grad_(sharding.trained)
    for layer in layers_of(model):
        packed = _PackedWeights(layer, sharding.device)
        vectors = {weight for weight in layer.parameters() if weight.ndim < 2}
        _shard(
            layer, sharding, dtype, ignored=None if sharding.trained else vectors, offload=sharding.offload
        )
        packed.watch(layer)
        if isinstance(layer, FusedDecoderLayer):
            layer.reader.is_passing = True
    # The root, by which the next layer is gathered while one is computed: where adapters are, PEFT calls the backbone.
    root: Any = model if sharding.trained else model.base_model
    left = {parameter for parameter in root.parameters() if not isinstance(parameter, DTensor)}
    _shard(root, sharding, dtype, ignored=None if sharding.trained else left)
    bring_whole(model, sharding.device, dtype)
    # transformers' generation then lets all ranks take as many steps as the one that needs most.
    vars(model)["_is_fsdp_managed_module"] = True


def bring_whole(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Bring what every rank keeps whole to its device; shares stay where they are kept, which may be host memory.

    Args:
        model: whose weights ranks share out.
        device: of this rank.
        dtype: what plain weights are held in, if not in what they are now.
    """
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device, _held_in(parameter, dtype))
            if (state := getattr(parameter, "quant_state", None)) is not None:
                state.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def place_adapter(model: nn.Module) -> None:
    """Bring what PEFT has added to the rank's device: it was put where weights are kept, which may be host memory."""
    state = get_state(model)
    if state is not None and state.sharding is not None:
        bring_whole(model, state.sharding.device)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks share out weights of ``model``."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_class(model: nn.Module) -> type:
    """The class of ``model``, where torch has given what it shares out another one."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def let_go(model: nn.Module) -> None:
    """Let ranks have shares of all weights again: embedding and head stay gathered after a forward without a backward.

    Who lists the parameters then, as an optimizer does, gets copies that nobody reads any more.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def check_adapter_settings(model: nn.Module, settings: dict[str, Any]) -> None:
    """Refuse, for a model whose weights ranks share out, what an adapter needs whole ones for.

    Args:
        model: the base model.
        settings: of ``get_peft_model``, or of a saved adapter.

    Raises:
        ConfigError: something that does.
    """
    if not is_sharded(model):
        return
    start, copied = settings.get("init_lora_weights", True), settings.get("modules_to_save") or ()
    given = {
        "use_dora": settings.get("use_dora"),
        "init_lora_weights": isinstance(start, str) and start not in ("gaussian", "orthogonal"),
        "modules_to_save": any(
            path.rpartition(".")[2] in copied and is_sharded(module) for path, module in model.named_modules()
        ),
        "target_parameters": settings.get("target_parameters"),
    }
    for name, is_given in given.items():
        if is_given:
            raise refusal(
                "fsdp", name, f"{name}={settings[name]!r} was given for weights that ranks share out."
            )


def device_of(layer: nn.Module) -> torch.device:
    """Where ``layer`` is computed, also where ranks keep their shares of it in host memory."""
    weight = next(layer.parameters())
    if not isinstance(weight, DTensor) or not _is_away(weight):
        return weight.device
    kind = weight.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _is_away(weight: DTensor) -> bool:
    return weight.device.type != weight.device_mesh.device_type


def gathered_bytes(model: Any, kept: tuple[int, int] = (0, 0)) -> Gathered:
    """Memory that a rank needs for weights while they are whole, and for gradients that it sends.

    Args:
        model: whose weights ranks share out, or which each has whole.
        kept: bytes that the first layer, and the last, keeps for its backward.
    """
    shared_out = [[p for p in layer.parameters() if isinstance(p, DTensor)] for layer in layers_of(model)]
    largest = max(shared_out, key=lambda one: sum(p.numel() for p in one), default=[])
    if not largest or _ranks(largest[0].device_mesh) == 1:
        return Gathered()
    if not any(p.requires_grad for p in largest):
        return frozen_gathered(sum(p.numel() * p.element_size() for p in largest))
    inside = {id(p) for some in shared_out for p in some}
    ends = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in inside)
    state, head = get_state(model), model.get_output_embeddings()
    sharding = None if state is None else state.sharding
    dtype = None if sharding is None else sharding.compute_dtype
    numbers = Trained(
        layer=sum(p.numel() for p in largest),
        ends=ends,
        head=0 if head is None else head.weight.numel(),
        is_tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )
    size, ranks = (dtype or largest[0].dtype).itemsize, _ranks(largest[0].device_mesh)
    return trained_gathered(numbers, size, ranks, kept)


# What bitsandbytes keeps on a packed weight, and PEFT asks for.
_OF_PACKED = ("quant_state", "quant_type", "compress_statistics", "quant_storage", "blocksize")


class _PackedWeights:
    """The 4-bit weights of a layer: shared out as plain bytes, they are told again what they stand for.

    Args:
        layer: with weights as bitsandbytes has packed them.
        device: of this rank, where their scales are kept.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._known: list[tuple[Any, dict[str, Any]]] = []
        for linear in cast("Iterator[Any]", layer.modules()):
            weight = linear._parameters.get("weight")
            if getattr(weight, "quant_state", None) is not None:
                about = {name: getattr(weight, name) for name in _OF_PACKED if hasattr(weight, name)}
                self._known.append((linear, about))
                about["quant_state"].to(device)
                # Bytes, whatever bitsandbytes stores them as: copies of floating ones may change the bits of NaNs.
                values = weight.data.view(torch.uint8).view(-1, 1)
                packed: Any = nn.Parameter(values, requires_grad=False)
                packed.whole_shape = torch.Size(((weight.quant_state.shape.numel() + 1) // 2, 1))
                linear.weight = packed

    def watch(self, layer: nn.Module) -> None:
        """Tell them now, and whenever ``layer`` has been gathered."""
        self._tell(layer, ())
        layer.register_forward_pre_hook(self._tell)  # behind FSDP's own, which goes before all others

    def _tell(self, layer: nn.Module, args: Any) -> None:
        for linear, about in self._known:
            weight = linear._parameters["weight"]
            if getattr(weight, "quant_state", None) is None:
                for name, value in about.items():
                    setattr(weight, name, value)


def _shard(
    module: nn.Module,
    sharding: Sharding,
    dtype: torch.dtype | None,
    *,
    ignored: set[nn.Parameter] | None = None,
    offload: bool = False,
) -> None:
    """Make the weights of ``module`` that no part of it shares out already a group of its own."""
    loaded = _lift(module, dtype, ignored or set())
    reduce_dtype = torch.float32 if sharding.trained else None
    policy = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=reduce_dtype)
    pins = sharding.device.type == "cuda"
    # Copies of what is frozen have nothing to tell one another.
    mesh = sharding.mesh if sharding.trained or sharding.mesh.ndim == 1 else sharding.mesh["fsdp"]
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy if sharding.trained else MixedPrecisionPolicy(cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=pins) if offload else OffloadPolicy(),
        ignored_params=ignored or None,
    )
    if any(tensor.itemsize == 1 for tensor in loaded.values()):
        cast(Any, module).set_custom_all_gather(Bytes())
    # transformers after 5.17 lets each class of layers recompute in its forward; FSDP's, made of one, inherits that.
    made = type(module)
    if isinstance(module, GradientCheckpointingLayer) and "forward" in vars(made):
        del made.forward
    _fill(loaded, torch.device("cpu") if offload else sharding.device)


# Where a parameter is: its module and name.
Place = tuple[nn.Module, str]


def _lift(module: nn.Module, dtype: torch.dtype | None, ignored: set[nn.Parameter]) -> dict[Place, Tensor]:
    """Put parameters without values in the places of those that are to be shared out; what was there, by its place.

    A rank then reads no more of a mapped file than its shares. torch 2.10 and 2.11 first make Parameters of them that
    take gradients, so that those of packed weights are of a floating dtype; what they are filled with is not.
    """
    loaded: dict[Place, Tensor] = {}
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or isinstance(parameter, DTensor) or parameter in ignored:
                continue
            if parameter not in empty:
                held = _held_in(parameter, dtype)
                floating = held if held.is_floating_point else torch.float8_e4m3fn
                shape = torch.empty(whole_shape(parameter), device="meta", dtype=floating)
                empty[parameter] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
            loaded[part, name] = parameter.data
            part._parameters[name] = empty[parameter]
    return loaded


def _fill(loaded: dict[Place, Tensor], device: torch.device) -> None:
    """Give parameters that are shared out their values; FSDP takes them up, and their dtypes, when it first gathers."""
    filled: dict[int, nn.Parameter] = {}
    for (part, name), tensor in loaded.items():
        parameter = part._parameters[name]
        assert isinstance(parameter, DTensor)
        if id(parameter) not in filled:
            held = parameter.dtype if tensor.is_floating_point() else tensor.dtype
            is_share = tensor.shape != parameter.shape
            share = (
                tensor.to(device, held) if is_share else cut(tensor, parameter).to(device, held, copy=True)
            )
            filled[id(parameter)] = nn.Parameter(joined(share, parameter), parameter.requires_grad)
        part._parameters[name] = filled[id(parameter)]


def _held_in(parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a weight is held in where ``dtype`` is wanted of plain ones; packed ones stay as they are."""
    is_plain = parameter.is_floating_point() and parameter.itemsize > 1
    return dtype if dtype is not None and is_plain else parameter.dtype
