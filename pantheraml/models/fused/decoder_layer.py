"""A decoder layer computed by fused functions: as a whole where its attention allows, else in parts around it."""

from __future__ import annotations

import operator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pantheraml.kernels.attention.backend import AttentionBackend, AttentionCall
from pantheraml.kernels.attention.layout import read_layout
from pantheraml.kernels.attention.table import choose
from pantheraml.kernels.launch import launching_on, why_no_triton
from pantheraml.kernels.rope import Rotary
from pantheraml.models.activation_sizes import TILE
from pantheraml.models.dropout_sites import called, checkpointed
from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.attention import NAME
from pantheraml.models.fused.functions import AttentionAndMLP, AttentionInput, AttentionOutput
from pantheraml.models.fused.host_store import HostStore
from pantheraml.models.fused.layer_function import FusedLayer, Keep, LayerCall
from pantheraml.models.fused.one_order import Factors, in_one_order
from pantheraml.models.fused.parts import InputPart
from pantheraml.models.fused.projection import computes_in
from pantheraml.models.fused.read_layer import LayerParts, LayerReader
from pantheraml.models.patching import PatchSet


class FusedDecoderLayer(nn.Module):
    """Stands for a decoder layer of transformers and shares its parts.

    What the fused functions do not cover (generation, adapters of other kinds, mixed dtypes, as of float32 masters
    under autocast) is computed by the old layer's own forward, on this object.

    Attributes:
        gradient_checkpointing: transformers' switch: recompute in training.
        keep_when_recomputing: what is kept then.
        store: where that is kept, if not on the GPU.
        tile: tokens computed at a time then.

    Args:
        layer: the layer it stands for.
        family: its architecture.
    """

    gradient_checkpointing = False

    def __init__(self, layer: nn.Module, family: ModelFamily) -> None:
        super().__init__()
        self.stock_class = type(layer)
        self.reader = LayerReader(family)
        self.keep_when_recomputing: Keep = "attended"
        self.store: HostStore | None = None
        self.tile = TILE
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
        # Kernels run on the current device, which need not be the layer's: of a split model, or of one of two models.
        with launching_on(hidden_states):
            return self._compute(
                hidden_states, attention_mask, position_ids, past_key_values, position_embeddings, **kwargs
            )

    def _compute(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor] | None,
        **kwargs: Any,
    ) -> Tensor:
        keep = self._keep()
        if keep != "all":  # a cache would be filled twice
            past_key_values = None
        parts = None
        # Generation (a cache and no gradients) stays with the stock layer.
        if position_embeddings is not None and (past_key_values is None or torch.is_grad_enabled()):
            parts = self._parts(hidden_states)
        kwargs |= dict(position_ids=position_ids)
        if parts is not None and position_embeddings is not None:
            shared = _shared(position_embeddings, hidden_states, parts.input)
            factors = in_one_order(parts.factors)
            whole = None
            if attention_mask is None and past_key_values is None:
                whole = self._whole(hidden_states, parts, factors, shared, keep, kwargs)
            if whole is not None:
                return whole
            compute = partial(
                self._around_attention,
                parts=parts,
                factors=factors,
                rotary=shared.rotary,
                mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        else:
            compute = partial(
                self.stock_class.forward,
                self,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        if keep == "all":
            return compute(hidden_states)
        return checkpointed(compute, hidden_states)

    def _keep(self) -> Keep:
        """What stays for the backward of this call."""
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return self.keep_when_recomputing if recompute else "all"

    def _parts(self, x: Tensor, *, as_frozen: bool = False) -> LayerParts | None:
        parts = self.reader.read(self, as_frozen=as_frozen)
        if isinstance(parts, str) or not computes_in(x.dtype, x.device) or x.dtype != parts.dtype:
            return None
        return parts

    def _whole(
        self,
        x: Tensor,
        parts: LayerParts,
        factors: Factors,
        shared: _Shared,
        keep: Keep,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """The layer as one function, or None where its attention or MLP is not of the kind that it covers."""
        module: Any = self.self_attn
        known = module.config._attn_implementation == NAME and getattr(module, "is_causal", True)
        dropout = self.training and module.attention_dropout
        if parts.mlp is None or not known or dropout or not kwargs.get("is_causal", True):
            return None
        settings = self._attention_settings(module)
        if settings.get("s_aux") is not None:
            return None
        call, backend = _attention_of(x, parts.input, settings, kwargs, shared)
        store = None if keep == "all" else self.store
        layer = LayerCall(*parts[:2], parts.mlp, shared.rotary, backend, call, keep, store, self.tile)
        with torch.autocast(x.device.type, enabled=False):
            return FusedLayer.apply(x.contiguous(), layer, *factors)

    def _around_attention(
        self,
        x: Tensor,
        *,
        parts: LayerParts,
        factors: Factors,
        rotary: Rotary,
        mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The layer in parts, around whatever attention the model uses."""
        device = x.device.type
        module: Any = self.self_attn
        before = len(parts.input.factors)
        with torch.autocast(device, enabled=False):
            q, k, v, residual = AttentionInput.apply(x.contiguous(), parts.input, rotary, *factors[:before])
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        attended = self._attend(q, k, v, mask, **kwargs).reshape(*x.shape[:2], -1)
        middle, last = parts.middle, parts.mlp
        with torch.autocast(device, enabled=False):
            if last is not None:
                return AttentionAndMLP.apply(residual, attended, middle, last, *factors[before:])
            s, h = AttentionOutput.apply(residual, attended, middle, *factors[before:])
        mlp: Any = self.mlp
        out = mlp(h)
        return s + (out[0] if isinstance(out, tuple) else out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """What the layer's attention does between its projections."""
        module: Any = self.self_attn
        eager = import_module(type(module).__module__).eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
        dropout = module.attention_dropout if self.training else 0.0
        settings = self._attention_settings(module)
        with called(module):
            return attend(module, q, k, v, mask, dropout=dropout, **settings, **kwargs)[0]

    def _attention_settings(self, module: Any) -> dict[str, Any]:
        window = getattr(
            module if hasattr(module, "sliding_window") else module.config, "sliding_window", None
        )
        settings = dict(scaling=module.scaling, sliding_window=window)
        return settings | self.reader.attention_settings(module)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; the weights leave their stacks first: savers want each to have memory of its own."""
        self.reader.release()
        return super().state_dict(*args, **kwargs)

    def before_revert(self) -> None:
        """Undo what was done to the layer's weights: each gets memory of its own again."""
        self.reader.release()


class _Shared(NamedTuple):
    """What all layers of a forward share; cos, which they are given too, knows it from the first of them.

    Attributes:
        sin: of the forward that it was made in.
        made_for: rows, tokens, and whether cos comes without its second half.
        rotary: cos and sin for each of the (B * S) tokens.
        attention: calls and who computes them, by what differs between layers; with the tensors they follow from.
    """

    sin: Tensor
    made_for: tuple[int, int, bool]
    rotary: Rotary
    attention: dict[tuple[Any, ...], tuple[tuple[Any, ...], AttentionCall, AttentionBackend]]


_SHARED = "_pantheraml_shared"


def _shared(position_embeddings: tuple[Tensor, Tensor], x: Tensor, part: InputPart) -> _Shared:
    batch, tokens, _ = x.shape
    made_for = batch, tokens, part.half_rotary
    known: _Shared | None = getattr(position_embeddings[0], _SHARED, None)
    if known is None or known.sin is not position_embeddings[1] or known.made_for != made_for:
        # Always memory of its own: a view of cos that cos knows would keep both for ever.
        cos, sin = (
            p.new_empty(batch, tokens, p.shape[-1]).copy_(p).flatten(0, 1) for p in position_embeddings
        )
        width = cos.shape[-1]
        rotary = Rotary(cos, sin, width if not part.half_rotary else 2 * width)
        known = _Shared(position_embeddings[1], made_for, rotary, {})
        setattr(position_embeddings[0], _SHARED, known)
    return known


def _attention_of(
    x: Tensor, part: InputPart, settings: dict[str, Any], kwargs: dict[str, Any], shared: _Shared
) -> tuple[AttentionCall, AttentionBackend]:
    """The layer's attention, and who computes it; decided once for all layers of a forward that are alike."""
    window, softcap = settings["sliding_window"], settings.get("softcap")
    kind = part.heads, part.kv_heads, part.head_dim, x.dtype, settings["scaling"], window, softcap
    source = tuple(kwargs.get(name) for name in ("position_ids", "cu_seq_lens_q", "max_length_q"))
    known = shared.attention.get(kind)
    if known is None or not all(map(operator.is_, known[0], source)):
        rows, tokens, _ = x.shape
        layout = read_layout((rows, tokens), x.device, *source)
        shape = rows, tokens, part.heads, part.kv_heads, part.head_dim
        call = AttentionCall(
            *shape, x.dtype, x.device, layout, settings["scaling"], window, softcap
        ).reduced()
        known = shared.attention[kind] = source, call, choose(call)
    return known[1:]


def apply_layers(
    model: nn.Module,
    family: ModelFamily,
    patches: PatchSet,
    *,
    on_cpu: bool = False,
    device: torch.device | None = None,
) -> PatchSet:
    """Swap the decoder layers, where Triton kernels launch.

    Args:
        model: the base model.
        family: its architecture.
        patches: the ledger.
        on_cpu: swap on a CPU too, where the functions compute by plain PyTorch.
        device: where the model is going to be, if it is not there yet.

    Returns:
        ``patches``.
    """
    layers = model.get_submodule(family.layers)
    device = device or next(model.parameters()).device
    reason = None if on_cpu and device.type == "cpu" else why_no_triton(device)
    if reason is not None:
        patches.skip("decoder layers", reason)
        return patches
    for index, layer in enumerate(list(layers.children())):
        path = f"{family.layers}.{index}"
        new = FusedDecoderLayer(layer, family)
        patches.replace(model, path, new, "a few functions instead of some forty kernels")
    return patches
