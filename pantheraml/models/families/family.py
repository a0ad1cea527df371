"""What a model family is: where its parts live and how they compute, as data.

Everything that depends on the size of a model (window, soft-cap, number of layers) is read from its
config; a family only says what to expect. A new architecture is one short file beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

# The names every LoRA script uses; most families call their projections so.
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Activation = Literal["silu", "gelu_pytorch_tanh", "clamped_swiglu"]
Deviation = Literal[
    "attention_softcap",  # logits of attention pass through a soft-cap (config.attn_logit_softcapping)
    "final_softcap",  # logits of the head do too (config.final_logit_softcapping)
    "sliding_window",  # some or all layers may see a window only (config.sliding_window)
    "attention_sinks",  # each head has a learned logit that takes probability (self_attn.sinks)
    "scaled_embedding",  # token embeddings are multiplied by sqrt(hidden_size)
    "sandwich_norm",  # attention and MLP outputs are normalised before they are added
    "partial_rotary",  # RoPE may turn only part of each head (rope_parameters.partial_rotary_factor)
    "half_rotary",  # cos and sin come as one half, which holds for both
    "residual_dropout",  # dropout on attention and MLP outputs (config.resid_pdrop)
]


class _Copyable:
    """Lets models that carry their family be copied and pickled, which read-only mappings cannot be."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # pyright: ignore[reportArgumentType]
        plain = {key: dict(v) if isinstance(v, MappingProxyType) else v for key, v in values.items()}
        return _rebuild, (type(self), plain)


def _rebuild(kind: type[Any], values: dict[str, Any]) -> Any:
    return kind(**{key: MappingProxyType(v) if isinstance(v, dict) else v for key, v in values.items()})


@dataclass(frozen=True)
class NormKind:
    """How a family's RMSNorm computes; ``x_hat = x / rms(x)`` is always in float32.

    Attributes:
        class_names: the classes of it in transformers.
        eps_name: the attribute that holds epsilon.
        offset: what is added to the weight (1 for Gemma).
        cast_first: whether x_hat is rounded to the input's dtype before the weight multiplies it.
    """

    class_names: tuple[str, ...]
    eps_name: str = "variance_epsilon"
    offset: float = 0.0
    cast_first: bool = True


@dataclass(frozen=True)
class Experts(_Copyable):
    """Where the experts of a mixture layer are; paths from the MLP.

    Attributes:
        module: the module that holds all experts of a layer.
        router: the module that chooses experts.
        parameters: well-known projection name -> 3-D Parameter of ``module``, one slice per expert.
    """

    module: str = "experts"
    router: str = "gate"
    parameters: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType(
            {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
        )
    )


@dataclass(frozen=True)
class ModelFamily(_Copyable):
    """Names and kinds of one family of causal language models.

    Attributes:
        name: what messages call it.
        model_types: values of ``config.model_type`` that belong to it.
        norm: its RMSNorm.
        activation: of the MLP; ``clamped_swiglu`` is gpt_oss's ``(up + 1) * gate * sigmoid(1.702 * gate)``.
        layers, embedding, final_norm, head: dotted paths from the causal language model.
        layer_norms: norms of a layer, in the order they are used.
        attention, mlp: attributes of a layer.
        attention_projections, mlp_projections: linears of these, as the family calls them; none for an
            MLP that has only experts.
        head_norms: norms of queries and keys, attributes of the attention.
        merged_projections: well-known projection name -> the linear that holds it together with others.
        experts: of mixture layers.
        deviations: what a fused path must look out for.
        not_text: modules beside the language model, left alone by kernels and adapters.
    """

    name: str
    model_types: tuple[str, ...]
    norm: NormKind
    activation: Activation = "silu"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_projections: tuple[str, ...] = ATTENTION_PROJECTIONS
    mlp_projections: tuple[str, ...] = MLP_PROJECTIONS
    head_norms: tuple[str, ...] = ()
    merged_projections: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    experts: Experts | None = None
    deviations: frozenset[Deviation] = frozenset()
    not_text: tuple[str, ...] = ()

    @property
    def expert_projections(self) -> dict[str, str]:
        """Well-known projection name -> Parameter of experts, as PEFT's ``target_parameters`` names it."""
        if self.experts is None:
            return {}
        prefix = f"{self.mlp}.{self.experts.module}"
        return {name: f"{prefix}.{parameter}" for name, parameter in self.experts.parameters.items()}

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Linears that LoRA adapts by default: all of a layer but routers."""
        return self.attention_projections + self.mlp_projections

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """Parameters that LoRA adapts by default: those of fused experts."""
        return tuple(dict.fromkeys(self.expert_projections.values()))
