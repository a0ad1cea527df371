"""A decoder layer whose two halves around the attention are one differentiable function each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pantheraml.kernels.launch import why_no_triton
from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.functions import (
    AttentionInput,
    AttentionOutput,
    InputPart,
    Norm,
    OutputPart,
    factors,
)
from pantheraml.models.fused.projection import Projection, computes_in, read_projection
from pantheraml.models.patching import PatchSet

# Families whose layer is: norm, q k v (bias allowed), rotary positions, attention, o, residual, norm, gated MLP,
# residual.
_PLAIN_LAYERS = ("llama", "mistral", "qwen2")


class FusedDecoderLayer(GradientCheckpointingLayer):
    """Stands for a decoder layer of transformers and shares its parts.

    What the fused functions do not cover (generation, adapters of other kinds, trained base weights, mixed dtypes) is
    computed by the old layer's own forward, on this object.

    Args:
        layer: the layer it stands for.
        family: its architecture.
        config: the model's configuration.
    """

    def __init__(self, layer: nn.Module, family: ModelFamily, config: Any) -> None:
        super().__init__()
        self.stock_class = type(layer)
        self.family = family
        self.config = config
        for name, value in vars(layer).items():
            if name not in vars(self):
                setattr(self, name, value)
        self._modules, self._parameters, self._buffers = layer._modules, layer._parameters, layer._buffers

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, S, H) -> (B, S, H); arguments as transformers passes them."""
        parts = None
        # Generation (a cache and no gradients) stays with the stock layer.
        if position_embeddings is not None and (past_key_values is None or torch.is_grad_enabled()):
            parts = self._read_parts(hidden_states)
        if parts is None or position_embeddings is None:
            return self.stock_class.forward(
                self,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        before, after = parts
        batch, tokens, _ = hidden_states.shape
        cos, sin = (part.expand(batch, -1, -1).reshape(batch * tokens, -1) for part in position_embeddings)
        with torch.autocast(hidden_states.device.type, enabled=False):
            q, k, v, residual = AttentionInput.apply(
                hidden_states.contiguous(), before, cos, sin, *factors(*before.projections)
            )
        module: Any = self.self_attn
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, _ = attend(
            module,
            q,
            k,
            v,
            attention_mask,
            dropout=module.attention_dropout if self.training else 0.0,
            scaling=module.scaling,
            sliding_window=getattr(module, "sliding_window", None)
            or getattr(self.config, "sliding_window", None),
            position_ids=position_ids,
            **kwargs,
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            return AttentionOutput.apply(
                residual,
                attended.reshape(batch, tokens, -1),
                after,
                *factors(after.o, after.gate, after.up, after.down),
            )

    def _read_parts(self, x: Tensor) -> tuple[InputPart, OutputPart] | None:
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        found = [
            read_projection(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ]
        found += [read_projection(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
        projections = [projection for projection in found if isinstance(projection, Projection)]
        if len(projections) < len(found) or any(p.linear.bias is not None for p in projections[3:]):
            return None
        q, k, v, o, gate, up, down = projections
        if (gate.a is None) != (up.a is None) or (
            gate.a is not None and up.a is not None and gate.a.shape[0] != up.a.shape[0]
        ):
            return None
        norms = [self._read_norm(name) for name in self.family.layer_norms]
        first, second = norms
        if first is None or second is None or x.dtype != first.weight.dtype:
            return None
        if not computes_in(x.dtype, x.device) or q.dtype != x.dtype:
            return None
        before = InputPart(first, (q, k, v), attention.head_dim)
        activation = "silu" if self.family.activation == "silu" else "gelu_tanh"
        return before, OutputPart(o, second, gate, up, down, activation)

    def _read_norm(self, name: str) -> Norm | None:
        norm: Any = getattr(self, name)
        kind = self.family.norm
        if norm.weight.requires_grad:
            return None
        eps = getattr(norm, "eps", None) or getattr(norm, kind.eps_name)
        return Norm(norm.weight, float(eps), kind.offset, kind.cast_first)


def apply_layers(
    model: nn.Module, family: ModelFamily, patches: PatchSet, *, on_cpu: bool = False
) -> PatchSet:
    """Swap the decoder layers of a family that has plain ones, where Triton kernels launch.

    Args:
        model: the base model.
        family: its architecture.
        patches: the ledger.
        on_cpu: swap on a CPU too, where the functions compute by plain PyTorch.

    Returns:
        ``patches``.
    """
    layers = model.get_submodule(family.layers)
    device = next(model.parameters()).device
    reason = None if on_cpu and device.type == "cpu" else why_no_triton(device)
    if family.name not in _PLAIN_LAYERS:
        reason = f"layers of {family.name} are built otherwise"
    if reason is not None:
        patches.skip("decoder layers", reason)
        return patches
    for index, layer in enumerate(list(layers.children())):
        path = f"{family.layers}.{index}"
        new = FusedDecoderLayer(layer, family, model.config)
        patches.replace(model, path, new, "two functions instead of some forty kernels")
    return patches
