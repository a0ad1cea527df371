"""What a model may still give up so that a step takes less memory: speed, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from pantheraml.models.recompute import is_recomputing, sections, set_recompute
from pantheraml.models.state import ModelState, get_state


class Resort(NamedTuple):
    """One way to keep less.

    Attributes:
        words: what is so then, as a clause.
        take: does it.
    """

    words: str
    take: Callable[[], None]


def next_resort(model: Any) -> Resort | None:
    """The cheapest way by which the next steps of ``model`` keep less than the last one, None if there is none."""
    state = get_state(model)
    if state is None:
        # A property of the model's, which wrappers pass on.
        if not getattr(model, "supports_gradient_checkpointing", False) or is_recomputing(model):
            return None
        return Resort("all layers recompute", partial(set_recompute, model, True))
    if any(plan.unpacked for plan in state.plans):
        return Resort("no 4-bit layer keeps 16-bit weights", partial(_keep_packed, state))
    parts = sections(model, state)
    layers, recomputing = sum(len(part.layers) for part in parts), sum(plan.layers for plan in state.plans)
    if state.recompute in (False, "auto") and recomputing < layers:
        return Resort("all layers recompute", partial(setattr, state, "recompute", True))
    is_offloading = state.recompute in ("offload", "unsloth")
    if not is_offloading and any(part.device.type == "cuda" for part in parts):
        words = "all layers recompute, from what lies in host memory"
        return Resort(words, partial(setattr, state, "recompute", "offload"))
    return None


def _keep_packed(state: ModelState) -> None:
    state.keep_dequantized = False
    state.plans = tuple(replace(plan, unpacked=0) for plan in state.plans)


@contextmanager
def restored_afterwards(model: Any) -> Iterator[None]:
    """What ``model`` gives up within, it has again afterwards."""
    state = get_state(model)
    before = is_recomputing(model) if state is None else (state.recompute, state.keep_dequantized)
    try:
        yield
    finally:
        if state is not None and isinstance(before, tuple):
            state.recompute, state.keep_dequantized = before
        elif state is None and is_recomputing(model) and not before:
            set_recompute(model, False)
