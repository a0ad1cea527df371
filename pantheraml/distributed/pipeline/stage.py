"""One stage of a split model: the model's own forward, of which this stage's layers alone compute.

A stage is a second view of the backbone, with the same class and the same layers. In the place of each layer of another
stage stands one that hands on what it gets; the one before the stage's first layer hands on what arrived instead. So
masks, positions and whatever else an architecture does around its layers are its own, on every stage.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.known_rows import known_rows
from pantheraml.models.split import Split

# Hooks are called on the model, once; not on each view of it.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


class _Elsewhere(nn.Module):
    """Stands for a layer of another stage."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


class _Arrival(nn.Module):
    """Stands for the layer before a stage's first: its output is what came from the stage before."""

    hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        found, self.hidden = self.hidden, None
        assert found is not None
        return found


class Stage:
    """Layers of a model that lie on one device.

    Args:
        model: the causal language model, without wrappers.
        family: where its parts are.
        split: where they lie.
        index: which of the split's stages this is.

    Attributes:
        device: where the stage computes.
        is_last: whether the final norm belongs to it.
    """

    def __init__(self, model: Any, family: ModelFamily, split: Split, index: int) -> None:
        place = split.stages[index]
        self.device, self.is_last = place.device, index == len(split.stages) - 1
        self._arrival = _Arrival() if place.first else None
        layers = list(model.get_submodule(family.layers).children())
        shown = [
            layer if place.first <= number < place.stop else _Elsewhere()
            for number, layer in enumerate(layers)
        ]
        if self._arrival is not None:
            shown[place.first - 1] = self._arrival
        path, _, name = family.layers.rpartition(".")
        self._view = view = copy.copy(model.get_submodule(path))
        parts: dict[str, nn.Module | None] = dict(view._modules)
        parts[name] = nn.ModuleList(shown).train()
        norm = family.final_norm.rpartition(".")[2]
        if not self.is_last:
            parts[norm] = nn.Identity()
        rotary = parts.get("rotary_emb")
        if rotary is not None:  # a copy here: tables are small, and reading them from elsewhere would wait
            parts["rotary_emb"] = copy.deepcopy(rotary).to(self.device)
        vars(view).update({"_modules": parts, "training": True}, **{hooks: OrderedDict() for hooks in _HOOKS})

    def forward(
        self, hidden: Tensor, batch: dict[str, Any], *, routers: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, S, H) from the stage before, or the embeddings, -> (B, S, H), and the logits of this stage's routers.

        Args:
            hidden: on this stage's device.
            batch: what else the model is given (masks, positions, offsets), likewise.
            routers: whether logits of routers are asked for; there are none else.
        """
        if self._arrival is not None:
            self._arrival.hidden = hidden
        given = {name: one for name, one in batch.items() if one is not None}
        with known_rows(self._view, given, hidden[..., 0]):
            # Routers are said in both cases, since the configuration may ask for their logits.
            output = self._view(inputs_embeds=hidden, use_cache=False, output_router_logits=routers, **given)
        return output.last_hidden_state, tuple(output.router_logits) if routers else ()


def build_stages(model: Any, family: ModelFamily, split: Split) -> list[Stage]:
    """The stages of ``model``, in order."""
    # What a model notes of its layers, transformers hooks into them when it is first asked for: once for all views.
    maybe_install_capturing_hooks(model.get_submodule(family.layers.rpartition(".")[0]))
    return [Stage(model, family, split, index) for index in range(len(split.stages))]
