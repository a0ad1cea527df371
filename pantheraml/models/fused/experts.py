"""The experts of a mixture layer as one differentiable function, and the block of a layer that calls it.

    rows   the k choices of each token, sorted by expert
    gu     x[rows] W1[e]^T + bias + LoRA                   v = activation(gu)
    y      v W2[e]^T + bias + LoRA                         out[t] = sum of w[t, j] * y over the choices of t

Gradients by hand: of x, of the routing weights w, of LoRA's factors, and of weights and biases that are trained. The
adapter's product B A is never formed. Kept for the backward are x, gu and LoRA's two narrow products.

The router stays as it is and decides who goes where; its own gradient comes in through w. The block is swapped, and
not a function registered with transformers' ExpertsInterface, because that one is called below PEFT's wrapper, which
has formed W + B A by then.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from pantheraml.kernels.expert_activation import activate, activate_back
from pantheraml.kernels.expert_groups import Groups
from pantheraml.kernels.expert_routing import Routes, sort_by_expert, sum_choices
from pantheraml.kernels.grouped_gemm import GroupedLowRank, grouped_rows
from pantheraml.kernels.grouped_outer import outer_into
from pantheraml.kernels.launch import why_no_triton
from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.expert_layers import ExpertProjection, Experts, read_experts
from pantheraml.models.fused.projection import computes_in
from pantheraml.models.patching import PatchSet

# Mixture blocks of transformers whose forward is: router, experts, reshape.
_BLOCKS = ("MixtralSparseMoeBlock", "Qwen3MoeSparseMoeBlock", "GptOssMLP")


def _project(
    x: Tensor, projection: ExpertProjection, groups: Groups, rows: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One projection of the sorted rows, and its ``scale * x A^T`` (S, R)."""
    factors, low_rank = projection.factors(x.dtype), None
    if factors is not None:
        t = grouped_rows(x, factors[0], groups, rows, scale=projection.scale)
        low_rank = GroupedLowRank(t, factors[1])
    y = grouped_rows(x, projection.weight, groups, rows, projection.bias, low_rank)
    return y, None if low_rank is None else low_rank.t


def _project_back(
    dy: Tensor,
    projection: ExpertProjection,
    groups: Groups,
    rows: Tensor | None = None,
    *,
    with_dx: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of the input of a projection, and its ``scale * dy B`` (S, R)."""
    factors, inner, low_rank = projection.factors(dy.dtype), None, None
    if factors is not None:
        inner = grouped_rows(dy, factors[1].mT, groups, rows, scale=projection.scale)
        low_rank = GroupedLowRank(inner, factors[0].mT)
    if not with_dx:
        return None, inner
    return grouped_rows(dy, projection.weight.mT, groups, rows, None, low_rank), inner


def _factor_gradients(
    projection: ExpertProjection,
    groups: Groups,
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    inner: Tensor | None,
    t: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B as PEFT stores them.

    Args:
        projection: the projection.
        groups: whose rows are whose.
        left: dy, and the row of it behind each sorted row (or None).
        right: x, likewise.
        inner: ``scale * dy B``.
        t: ``scale * x A^T``, weighted as dy is not.
    """
    a, b = projection.a, projection.b
    if a is None or b is None or inner is None or t is None:
        return None, None
    experts = groups.ends.numel()
    da = db = None
    if a.requires_grad:
        da = torch.empty_like(a, memory_format=torch.contiguous_format)
        outer_into(inner, right[0], groups, da.view(experts, -1, a.shape[1]), right_rows=right[1])
    if b.requires_grad:
        db = torch.empty_like(b, memory_format=torch.contiguous_format)
        outer_into(left[0], t, groups, db.view(b.shape[0], -1, experts).permute(2, 0, 1), left_rows=left[1])
    return da, db


def _weight_gradient(
    projection: ExpertProjection,
    groups: Groups,
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
) -> Tensor | None:
    """Gradient of a trained weight as the module stores it."""
    parameter = projection.parameter
    if not parameter.requires_grad:
        return None
    dw = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    out = dw.mT if projection.stored_in_by_out else dw
    outer_into(left[0], right[0], groups, out, left[1], right[1])
    return dw


class ExpertsFunction(torch.autograd.Function):
    """The experts of a layer on all tokens, routing weights inside."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, routes: Routes, part: Experts, *_: Tensor | None
    ) -> Tensor:
        """x (T, H); weights and index (T, k); what is trained is read from ``part`` and listed for autograd."""
        gu, t_up = _project(x, part.gate_up, routes.groups, routes.tokens)
        value = activate(gu, part.gate)
        y, t_down = _project(value, part.down, routes.groups)
        out = sum_choices(y, routes.place, weights)
        ctx.part, ctx.routes = part, routes
        ctx.save_for_backward(x, weights, index, gu, t_up, t_down)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, of the routing weights, and of what is trained."""
        part: Experts = ctx.part
        routes: Routes = ctx.routes
        x, weights, index, gu, t_up, t_down = ctx.saved_tensors
        groups, tokens = routes.groups, routes.tokens
        up, down = part.gate_up, part.down
        dout = dout.contiguous()
        w = weights.reshape(-1).index_select(0, routes.order).float()

        # The routing weight of a row goes into the narrow side of each product, not into the wide dout.
        dv, inner_down = _project_back(dout, down, groups, tokens)
        assert dv is not None
        dgu, dw, value = activate_back(
            dv, gu, w, part.gate, with_value=t_down is not None or down.parameter.requires_grad
        )
        del dv
        down_gradients: list[Tensor | None] = [None] * 4
        if value is not None:
            left, right = (dout, tokens), (value, None)
            t = None if t_down is None else (t_down.float() * w[:, None]).to(t_down.dtype)
            down_gradients[:2] = _factor_gradients(down, groups, left, right, inner_down, t)
            down_gradients[2] = _weight_gradient(down, groups, left, right)
        dweights = dw.index_select(0, routes.place.reshape(-1)).view(weights.shape)
        if down.bias is not None:
            dweights += (dout @ down.bias.detach().to(dout.dtype).T).gather(1, index)
            if down.bias.requires_grad:
                chosen = index[..., None] == torch.arange(part.count, device=index.device)
                shares = (chosen * weights[..., None]).sum(1).to(dout.dtype)  # (T, E)
                down_gradients[3] = (shares.T @ dout).to(down.bias.dtype)

        dx, inner_up = _project_back(dgu, up, groups, with_dx=ctx.needs_input_grad[0])
        left, right = (dgu, None), (x, tokens)
        up_gradients = [
            *_factor_gradients(up, groups, left, right, inner_up, t_up),
            _weight_gradient(up, groups, left, right),
            _bias_gradient(up, groups, dgu),
        ]
        if dx is not None:
            dx = sum_choices(dx, routes.place)
        return dx, dweights.to(weights.dtype), None, None, None, *up_gradients, *down_gradients


def _bias_gradient(projection: ExpertProjection, groups: Groups, dy: Tensor) -> Tensor | None:
    bias = projection.bias
    if bias is None or not bias.requires_grad:
        return None
    gradient = torch.empty_like(bias)
    outer_into(dy, dy.new_ones(1, 1).expand(dy.shape[0], 1), groups, gradient[..., None])
    return gradient


class FusedMixture(nn.Module):
    """Stands for a mixture block of transformers and shares its parts.

    What the fused function does not cover (several adapters, merged ones about to be taken out, other dtypes, experts
    spread over GPUs) is computed by the old block's own forward, on this object.

    Args:
        block: the block it stands for.
        family: its architecture.
    """

    def __init__(self, block: nn.Module, family: ModelFamily) -> None:
        super().__init__()
        self.stock_class = type(block)
        assert family.experts is not None
        self.names = family.experts
        for name, value in vars(block).items():
            if name not in vars(self):
                setattr(self, name, value)
        self._modules, self._parameters, self._buffers = block._modules, block._parameters, block._buffers

    def forward(self, hidden_states: Tensor) -> Any:
        """(B, S, H) -> (B, S, H), and for gpt_oss the routing weights beside it."""
        part = self._read_part(hidden_states)
        if isinstance(part, str):
            return self.stock_class.forward(self, hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = getattr(self, self.names.router)(flat)
        with torch.autocast(flat.device.type, enabled=False):
            routes = sort_by_expert(index, part.count)
            out = ExpertsFunction.apply(
                flat.contiguous(),
                weights.contiguous(),
                index,
                routes,
                part,
                *part.gate_up.trained(),
                *part.down.trained(),
            )
        out = out.view(hidden_states.shape)
        return (out, weights) if self.stock_class.__name__ == "GptOssMLP" else out

    def _read_part(self, x: Tensor) -> Experts | str:
        if self.training and getattr(self, "jitter_noise", 0):
            return "the router's input is jittered"
        part = read_experts(getattr(self, self.names.module))
        if isinstance(part, str):
            return part
        if x.dtype != part.down.parameter.dtype or not computes_in(x.dtype, x.device):
            return "weights and hidden states differ in dtype"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.numel() == 0:
            return "nothing to multiply, or in an unusual dtype"
        return part


def apply_experts(
    model: nn.Module,
    family: ModelFamily,
    patches: PatchSet,
    *,
    on_cpu: bool = False,
    device: torch.device | None = None,
) -> PatchSet:
    """Swap the mixture blocks of a family that has experts, where Triton kernels launch.

    Works before and after PEFT wraps the model. Blocks that stay are recorded with the reason.

    Args:
        model: the model or its PEFT wrapper.
        family: its architecture.
        patches: the ledger.
        on_cpu: swap on a CPU too, where the function computes by plain PyTorch.
        device: where the model is going to be, if it is not there yet.

    Returns:
        ``patches``.
    """
    if family.experts is None:
        return patches
    kept: Counter[str] = Counter()
    for path, block in list(model.named_modules()):
        cls = type(block)
        if cls.__name__ not in _BLOCKS or not cls.__module__.startswith("transformers.models."):
            continue
        reason = _why_not_block(block, family, on_cpu, device)
        if reason is None:
            patches.replace(
                model, path, FusedMixture(block, family), "one function for all experts of a layer"
            )
        else:
            kept[reason] += 1
    for reason, count in kept.items():
        patches.skip(f"{count} mixtures of experts", reason)
    return patches


def _why_not_block(
    block: nn.Module, family: ModelFamily, on_cpu: bool, device: torch.device | None
) -> str | None:
    assert family.experts is not None
    device = device or next(block.parameters()).device
    reason = None if on_cpu and device.type == "cpu" else why_no_triton(device)
    if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reason = "tiles of the grouped products need a GPU of sm_80 or newer"
    if reason is not None:
        return reason
    if "forward" in vars(block):
        return "another library put a forward of its own on the module"
    experts: Any = getattr(block, family.experts.module)
    found = read_experts(experts)
    return found if isinstance(found, str) else None
