"""Memory that runs out on purpose: a layer raises torch's own error where a pass has too many tokens."""

from __future__ import annotations

import torch


class _RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, starve):
        ctx.starve = starve
        return hidden.clone()  # FSDP2 warns of views

    @staticmethod
    def backward(ctx, gradient):
        ctx.starve()
        return gradient, None


class Starved:
    """A hook on a part of ``model``: what comes after it has its gradients already in a backward.

    Args:
        model: a causal language model, with an adapter or without.
        most: tokens that fit.
        backward: whether they run out there, or in the forward.
        unless_recomputing: whether more fit where layers recompute.
        at: the part, a decoder layer or one within.

    Attributes:
        failures: tokens of the passes that did not fit, in order.
        passes: tokens of all others.
    """

    def __init__(self, model, most, *, backward=False, unless_recomputing=False, at="layers.0"):
        self.most, self.backward, self.unless_recomputing = most, backward, unless_recomputing
        self.failures, self.passes = [], []
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.handle = base.model.get_submodule(at).register_forward_hook(self.hook)

    def hook(self, layer, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        tokens = hidden.shape[0] * hidden.shape[1]

        def starve():
            if tokens > self.most and not (self.unless_recomputing and layer.gradient_checkpointing):
                self.failures.append(tokens)
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} GiB.")
            self.passes.append(tokens)

        if not (self.backward and torch.is_grad_enabled()):
            starve()
            return output
        held = _RaisesInBackward.apply(hidden, starve)
        return (held, *output[1:]) if isinstance(output, tuple) else held
