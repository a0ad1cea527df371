"""What the halves of a decoder layer compute with: its norms, its stacks of weights, and its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from pantheraml.kernels.rms_norm import RMSNorm
from pantheraml.kernels.rope_qkv import HeadNorms
from pantheraml.models.fused.slots import factors
from pantheraml.models.fused.stack import BoundStack
from pantheraml.models.fused.trained_stack import TrainedStack

Weights = BoundStack | TrainedStack


def _weight(norm: RMSNorm | None) -> Tensor | None:
    """What is trained of a norm."""
    return norm.weight if norm is not None and norm.is_trained else None


@dataclass(frozen=True)
class InputPart:
    """From a layer's input to q, k and v.

    Attributes:
        norm: of the input.
        qkv: weights of q, k and v, as three projections or as one.
        heads: of q.
        kv_heads: of k, and of v.
        head_dim: D.
        head_norms: of each head of q, and of each of k; or None.
        half_rotary: whether cos and sin come without their second half, which is like the first (gpt_oss).
    """

    norm: RMSNorm
    qkv: Weights
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: HeadNorms | None = None
    half_rotary: bool = False

    def at(self, row: int) -> InputPart:
        """For rows of the input that begin at ``row``."""
        return replace(self, qkv=self.qkv.at(row))

    @cached_property
    def factors(self) -> list[Tensor | None]:
        """What is trained, in the order in which the backward gives gradients."""
        norms = self.norm, *(self.head_norms or ())
        return [*factors(*self.qkv.projections), *map(_weight, norms)]

    @cached_property
    def widths(self) -> tuple[int, int, int]:
        """Columns of q, k and v in their product."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def bias(self) -> list[Tensor | None]:
        """The biases of q, k and v."""
        found = [projection.linear.bias for projection in self.qkv.projections]
        if len(found) == 3:
            return list(found)
        return [None] * 3 if found[0] is None else list(found[0].split(self.widths))


@dataclass(frozen=True)
class MiddlePart:
    """From what was attended to the MLP's input: output projection, residual, norm.

    Attributes:
        o: weights of the output projection.
        post: norm of the output projection's product, before it is added (Gemma), or None.
        norm: of the sum.
    """

    o: Weights
    post: RMSNorm | None
    norm: RMSNorm

    def at(self, row: int) -> MiddlePart:
        """For rows of the input that begin at ``row``."""
        return replace(self, o=self.o.at(row))

    @cached_property
    def factors(self) -> list[Tensor | None]:
        """As of the part before the attention."""
        return [*factors(*self.o.projections), _weight(self.post), _weight(self.norm)]


@dataclass(frozen=True)
class MLPPart:
    """The gated MLP and its residual.

    Attributes:
        gate_up: weights of gate and up, as two projections or as one.
        down: weights of down.
        post: norm of down's product, before it is added (Gemma), or None.
        activation: of the gate.
    """

    gate_up: Weights
    down: Weights
    post: RMSNorm | None
    activation: str

    def at(self, row: int) -> MLPPart:
        """For rows of the input that begin at ``row``."""
        return replace(self, gate_up=self.gate_up.at(row), down=self.down.at(row))

    @cached_property
    def factors(self) -> list[Tensor | None]:
        """As of the part before the attention."""
        return [*factors(*self.gate_up.projections, *self.down.projections), _weight(self.post)]
