"""What PantheraML knows about a model it loaded, kept on the model itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pantheraml.models.patching import PatchSet
from pantheraml.models.precision import Precision

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

    from pantheraml.models.families import ModelFamily
    from pantheraml.models.fused import HostStore
    from pantheraml.models.recompute_plan import RecomputePlan
    from pantheraml.models.sharding import Sharding
    from pantheraml.models.source import ModelSource
    from pantheraml.models.split import Split

Recompute = bool | Literal["auto", "offload", "unsloth"]

_ATTRIBUTE = "pantheraml_state"


@dataclass
class ModelState:
    """Facts about one loaded model.

    Attributes:
        source: where it came from.
        max_seq_length: longest training row, in tokens.
        precision: how its weights are held.
        recompute: the user's ``use_gradient_checkpointing``.
        keep_dequantized: whether 4-bit weights may stay in 16 bits, too, where memory is free.
        full_finetuning: whether all weights are trained.
        family: its architecture as data, or None for the generic path.
        kernels: ``"auto"`` or ``"off"``.
        patches: the ledger of everything that was changed on it: fused parts, bound methods.
        split: where its parts are, if on several devices.
        sharding: how its weights are shared out between ranks, if they are.
        in_flight: micro-batches that the layers of a device hold at a time, where that is more than one.
        plans: what its layers recompute, by device, made for the longest batch so far.
        planned_for: the policy they were made for.
        stores: host memory for what layers keep, by device, once a plan uses it.
        decoding: the ledger of what ``for_inference`` changed, which ``for_training`` undoes.
        with_adapter: the model around this one, with the adapter that it got; a script may still hold this one.
    """

    source: ModelSource
    max_seq_length: int
    precision: Precision
    recompute: Recompute
    keep_dequantized: bool
    full_finetuning: bool
    family: ModelFamily | None
    kernels: str
    patches: PatchSet
    split: Split | None = None
    sharding: Sharding | None = None
    in_flight: dict[torch.device, float] = field(default_factory=dict)
    plans: tuple[RecomputePlan, ...] = ()
    planned_for: Recompute | None = None
    stores: dict[torch.device, HostStore] = field(default_factory=dict)
    decoding: PatchSet = field(default_factory=PatchSet)
    with_adapter: PeftModel | None = None


def set_state(model: nn.Module, state: ModelState) -> None:
    """Keep ``state`` on ``model``; wrappers such as PEFT's forward the attribute."""
    setattr(model, _ATTRIBUTE, state)


def get_state(model: nn.Module) -> ModelState | None:
    """The state of a model loaded by PantheraML (also through wrappers), or None for any other model."""
    state = getattr(model, _ATTRIBUTE, None)
    return state if isinstance(state, ModelState) else None


def patches_of(model: nn.Module) -> PatchSet:
    """The ledger of ``model``, or a new one for a model that was not loaded by PantheraML."""
    state = get_state(model)
    return PatchSet() if state is None else state.patches
