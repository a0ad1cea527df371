"""A decoder layer whose parts around the attention are one differentiable function each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pantheraml.kernels.launch import why_no_triton
from pantheraml.kernels.rope import Rotary
from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.functions import AttentionAndMLP, AttentionInput, AttentionOutput
from pantheraml.models.fused.parts import InputPart
from pantheraml.models.fused.projection import computes_in
from pantheraml.models.fused.read_layer import LayerParts, LayerReader
from pantheraml.models.fused.stack import factors
from pantheraml.models.patching import PatchSet


class FusedDecoderLayer(GradientCheckpointingLayer):
    """Stands for a decoder layer of transformers and shares its parts.

    What the fused functions do not cover (generation, adapters of other kinds, trained base weights, mixed dtypes) is
    computed by the old layer's own forward, on this object.

    Args:
        layer: the layer it stands for.
        family: its architecture.
    """

    def __init__(self, layer: nn.Module, family: ModelFamily) -> None:
        super().__init__()
        self.stock_class = type(layer)
        self.reader = LayerReader(family)
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
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, S, H) -> (B, S, H); arguments as transformers passes them."""
        parts = None
        # Generation (a cache and no gradients) stays with the stock layer.
        if position_embeddings is not None and (past_key_values is None or torch.is_grad_enabled()):
            parts = self._parts(hidden_states)
        if parts is None or position_embeddings is None:
            return self.stock_class.forward(
                self,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        device = hidden_states.device.type
        rotary = _flat_rotary(position_embeddings, hidden_states, parts.input)
        with torch.autocast(device, enabled=False):
            q, k, v, residual = AttentionInput.apply(
                hidden_states.contiguous(), parts.input, rotary, *factors(*parts.input.qkv.projections)
            )
        attended = self._attend(
            q, k, v, attention_mask, past_key_values, position_ids=position_ids, **kwargs
        ).reshape(*hidden_states.shape[:2], -1)
        o = factors(*parts.middle.o.projections)
        if parts.mlp is not None:
            found = factors(*parts.mlp.gate_up.projections, *parts.mlp.down.projections)
            with torch.autocast(device, enabled=False):
                return AttentionAndMLP.apply(residual, attended, parts.middle, parts.mlp, *o, *found)
        with torch.autocast(device, enabled=False):
            s, h = AttentionOutput.apply(residual, attended, parts.middle, *o)
        mlp: Any = self.mlp
        out = mlp(h)
        return s + (out[0] if isinstance(out, tuple) else out)

    def _parts(self, x: Tensor) -> LayerParts | None:
        parts = self.reader.read(self)
        if isinstance(parts, str) or not computes_in(x.dtype, x.device) or x.dtype != parts.dtype:
            return None
        return parts

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past_key_values: Any, **kwargs: Any
    ) -> Tensor:
        """What the layer's attention does between its projections."""
        module: Any = self.self_attn
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        eager = import_module(type(module).__module__).eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
        window = getattr(
            module if hasattr(module, "sliding_window") else module.config, "sliding_window", None
        )
        settings = dict(scaling=module.scaling, sliding_window=window)
        settings |= self.reader.attention_settings(module)
        dropout = module.attention_dropout if self.training else 0.0
        return attend(module, q, k, v, mask, dropout=dropout, **settings, **kwargs)[0]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; the weights leave their stacks first: savers want each to have memory of its own."""
        self.reader.release()
        return super().state_dict(*args, **kwargs)

    def before_revert(self) -> None:
        """Undo what was done to the layer's weights: each gets memory of its own again."""
        self.reader.release()


def _flat_rotary(position_embeddings: tuple[Tensor, Tensor], x: Tensor, part: InputPart) -> Rotary:
    """cos and sin for each of the (B * S) tokens."""
    batch, tokens, _ = x.shape
    cos, sin = (p.expand(batch, -1, -1).reshape(batch * tokens, -1).contiguous() for p in position_embeddings)
    width = cos.shape[-1]
    return Rotary(cos, sin, width if not part.half_rotary else 2 * width)


def apply_layers(
    model: nn.Module, family: ModelFamily, patches: PatchSet, *, on_cpu: bool = False
) -> PatchSet:
    """Swap the decoder layers, where Triton kernels launch.

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
    if reason is not None:
        patches.skip("decoder layers", reason)
        return patches
    for index, layer in enumerate(list(layers.children())):
        path = f"{family.layers}.{index}"
        new = FusedDecoderLayer(layer, family)
        patches.replace(model, path, new, "a few functions instead of some forty kernels")
    return patches
