"""What a decoder layer is made of, read from its modules at every call; or why fused functions cannot compute it.

What was read before is used again where it is found unchanged: making it anew takes the host longer than looking. Who
knows that nothing changes between calls, as in a pipelined step, lets one reading serve them all without a look; the
factors then stay in their margins, too.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pantheraml.kernels.rms_norm import RMSNorm
from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.fp8_stack import Fp8Stack
from pantheraml.models.fused.parts import InputPart, MiddlePart, MLPPart, Weights
from pantheraml.models.fused.projection import Projection, is_same, read_projection
from pantheraml.models.fused.stack import Stack
from pantheraml.models.fused.trained_stack import TrainedStack

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class LayerParts(NamedTuple):
    """The parts of one layer, with the adapters of this call.

    Attributes:
        input: before the attention.
        middle: after it, up to the MLP's input.
        mlp: the gated MLP, or None where the layer's MLP is of another kind (a mixture of experts).
        dtype: what they compute in.
        factors: what is trained, in the order of the parts.
    """

    input: InputPart
    middle: MiddlePart
    mlp: MLPPart | None
    dtype: torch.dtype
    factors: tuple[Tensor | None, ...]

    @property
    def stacks(self) -> list[Weights]:
        """Those of all parts."""
        mlp = [] if self.mlp is None else [self.mlp.gate_up, self.mlp.down]
        return [self.input.qkv, self.middle.o, *mlp]

    @property
    def drop(self) -> bool:
        """Whether an adapter drops values of its input."""
        return any(stack.inputs.drop for stack in self.stacks)


class LayerReader:
    """Reads one layer of a family, and holds the memory its weights are stacked in.

    Attributes:
        keeps_unpacked: whether 4-bit weights stay unpacked between calls; set by ``keep_unpacked``.
        is_passing: whether weights are in their places only while the layer is computed; set before the first reading.

    Args:
        family: the layer's architecture.
    """

    def __init__(self, family: ModelFamily) -> None:
        self.family = family
        self.keeps_unpacked = False
        self.is_passing = False
        self._stacks: dict[str, Stack | Fp8Stack] = {}
        self._holds = False
        self._held: LayerParts | None = None
        self._known: LayerParts | None = None
        self._read_from: list[tuple[Any, ...]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _copy_of, (self.family, self.keeps_unpacked)  # the layer's copy stacks its own weights

    def hold(self, hold: bool) -> None:
        """Let the next reading serve all calls until ``hold(False)``; adapters that drop are read at every call."""
        self._holds, self._held = hold, None

    def read(self, layer: nn.Module, *, as_frozen: bool = False) -> LayerParts | str:
        """The parts of ``layer``, or why it runs as transformers wrote it.

        With ``as_frozen``, for who wants no gradients, weights that are trained lie in stacks, too, until ``release``.
        """
        if self._held is not None and not as_frozen:
            return self._held
        found = self._read(layer, as_frozen)
        if self._holds and not as_frozen and isinstance(found, LayerParts) and not found.drop:
            self._held = found
        return found

    def _read(self, layer: nn.Module, as_frozen: bool) -> LayerParts | str:
        family = self.family
        attention = layer.get_submodule(family.attention)
        norms = [self._norm(layer, name) for name in family.layer_norms]
        head_norms = [self._norm(attention, name) for name in family.head_norms]
        if layer.training and _has_residual_dropout(layer):
            return "the residual has dropout"
        groups = self.groups(layer)
        found: list[Projection] = []
        for module in (module for modules in groups.values() for module in modules):
            projection = read_projection(module, as_frozen=as_frozen)
            if isinstance(projection, str):
                return projection
            found.append(projection)
        of_norms = tuple(norm.is_trained for norm in (*norms, *head_norms))
        if any(of_norms) and not as_frozen and not any(projection.is_trained for projection in found):
            return "norms are trained, and no weights"
        read_from = [*found, *norms, *head_norms, of_norms]
        if self._known is not None and self._is_known(read_from):
            return self._known
        taken = iter(found)
        stacks = {name: tuple(islice(taken, len(modules))) for name, modules in groups.items()}
        reason = _why_not_together(stacks)
        if reason is not None:
            return reason
        bound = {name: self._bind(name, projections) for name, projections in stacks.items()}
        self._known, self._read_from = self._assemble(attention, bound, norms, head_norms), read_from
        return self._known

    def _is_known(self, read_from: list[tuple[Any, ...]]) -> bool:
        """Whether just this was read last, and weights lie where they lay; begins another call of the stacks."""
        if len(read_from) != len(self._read_from) or not all(map(is_same, read_from, self._read_from)):
            return False
        return self._known is not None and all(stack.renew() for stack in self._known.stacks)

    def _bind(self, name: str, projections: tuple[Projection, ...]) -> Weights:
        if any(projection.is_trained for projection in projections):
            return TrainedStack(projections)
        if name not in self._stacks:
            stack = self._stacks[name] = Fp8Stack() if projections[0].is_fp8 else Stack()
            stack.keeps_unpacked, stack.is_passing = self.keeps_unpacked, self.is_passing
        return self._stacks[name].bind(projections)

    def groups(self, layer: nn.Module) -> dict[str, list[nn.Module]]:
        """The linears of ``layer`` that share an input, by the name of their stack; those of the MLP only where it is
        a gated one.
        """
        attention, mlp = layer.get_submodule(self.family.attention), layer.get_submodule(self.family.mlp)
        *inputs, output = (getattr(attention, name) for name in self.family.attention_projections)
        groups = {"qkv": inputs, "o": [output]}
        names = self.family.mlp_projections
        if names and all(hasattr(mlp, name) for name in names):
            *inputs, output = (getattr(mlp, name) for name in names)
            groups |= {"gate_up": inputs, "down": [output]}
        return groups

    @property
    def beside_bytes(self) -> int:
        """Bytes that the stacks hold beside the memory of their weights."""
        return sum(stack.beside_bytes for stack in self._stacks.values())

    @property
    def missing_bytes(self) -> int:
        """Bytes that a backward will add to ``beside_bytes``."""
        return sum(stack.missing_bytes for stack in self._stacks.values())

    def attention_settings(self, attention: Any) -> dict[str, Any]:
        """What the family's attention tells the attention function besides scale and window."""
        settings: dict[str, Any] = {}
        if "attention_softcap" in self.family.deviations:
            settings["softcap"] = attention.attn_logit_softcapping
        if "attention_sinks" in self.family.deviations:
            settings["s_aux"] = attention.sinks
        return settings

    def keep_unpacked(self, keep: bool) -> None:
        """Let 4-bit weights stay unpacked between calls, or give that memory back."""
        if keep == self.keeps_unpacked:
            return
        self.keeps_unpacked = keep
        self._known = None
        for stack in self._stacks.values():
            stack.keeps_unpacked = keep
            stack.release()

    def release(self, *, trained_only: bool = False) -> None:
        """Give the weights back their own memory; all of them, or those that are trained."""
        self._held = self._known = None
        for stack in self._stacks.values():
            if stack.is_trained or not trained_only:
                stack.release()

    def _assemble(
        self,
        attention: Any,
        bound: dict[str, Weights],
        norms: list[RMSNorm],
        head_norms: list[RMSNorm],
    ) -> LayerParts:
        config, sandwich = attention.config, len(norms) == 4
        before = InputPart(
            norm=norms[0],
            qkv=bound["qkv"],
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            head_norms=(head_norms[0], head_norms[1]) if head_norms else None,
            half_rotary="half_rotary" in self.family.deviations,
        )
        middle = MiddlePart(bound["o"], norms[1] if sandwich else None, norms[2] if sandwich else norms[1])
        mlp = None
        if "down" in bound:
            activation = _ACTIVATIONS[self.family.activation]
            mlp = MLPPart(bound["gate_up"], bound["down"], norms[3] if sandwich else None, activation)
        found = [*before.factors, *middle.factors, *([] if mlp is None else mlp.factors)]
        return LayerParts(before, middle, mlp, bound["qkv"].projections[0].dtype, tuple(found))

    def _norm(self, owner: nn.Module, name: str) -> RMSNorm:
        norm: Any = getattr(owner, name)
        kind = self.family.norm
        eps = getattr(norm, "eps", None) or getattr(norm, kind.eps_name)
        return RMSNorm(norm.weight, float(eps), kind.offset, kind.cast_first)


def _copy_of(family: ModelFamily, keeps_unpacked: bool) -> LayerReader:
    reader = LayerReader(family)
    reader.keeps_unpacked = keeps_unpacked
    return reader


def _why_not_together(stacks: dict[str, tuple[Projection, ...]]) -> str | None:
    """Why these projections cannot be computed as stacks."""
    found = [projection for projections in stacks.values() for projection in projections]
    if len({projection.dtype for projection in found}) > 1:
        return "weights of several dtypes"
    if any(one.rank for one in found) and any(one.is_trained for one in found):
        return "base weights are trained beside an adapter"
    for projections in stacks.values():
        if len({projection.is_packed for projection in projections}) > 1:
            return "4-bit and 16-bit weights side by side"
        if len({projection.is_fp8 for projection in projections}) > 1:
            return "FP8 and 16-bit weights side by side"
    biased = [p for name in ("gate_up", "down") for p in stacks.get(name, ()) if p.linear.bias is not None]
    return "the MLP has biases" if biased else None


def _has_residual_dropout(layer: nn.Module) -> bool:
    names = ("resid_attn_dropout", "resid_mlp_dropout")
    return any(getattr(getattr(layer, name, None), "p", 0.0) > 0 for name in names)
