"""What to change where a step does not fit, with what each change would save by the estimate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
from transformers import TrainingArguments

from pantheraml.devices.memory import describe_bytes
from pantheraml.errors import HardwareError
from pantheraml.models.memory_estimate import MemoryEstimate, describe, predicted_bytes
from pantheraml.models.precision import Precision
from pantheraml.models.recompute_plan import RecomputePlan, offload_plan
from pantheraml.models.state import ModelState, get_state
from pantheraml.models.weight_sizes import measure_parts

# Changes that save less than this share of what a step takes are not worth a word.
_LEAST_SHARE = 0.01
_MOST_CHANGES = 3


class Change(NamedTuple):
    """What to type, and the bytes that it saves."""

    what: str
    saved: int


class Shorter(NamedTuple):
    """How rows are made shorter.

    Attributes:
        setting: of which half is taken.
        tokens: of a row then.
    """

    setting: str
    tokens: int


def out_of_memory_error(
    got: str, model: Any, args: TrainingArguments, tokens: int, shorter: Shorter | None = None
) -> HardwareError:
    """The error of a run that cannot go on.

    Args:
        got: what happened, as a sentence.
        model: what is trained.
        args: of the run.
        tokens: of the smallest pass: one row.
        shorter: how rows are made shorter, where it is not by ``max_seq_length``.
    """
    state = get_state(model)
    if state is None:
        need = "What it needs is not predicted for models that FastLanguageModel did not load."
        setting = "max_length" if shorter is None else shorter.setting
        return HardwareError(got, need, f"Shorten the rows ({setting}), or take a GPU with more memory.")
    shorter = shorter or Shorter("max_seq_length", max(1, tokens // 2))
    now = _predicted(model, state, args, tokens)
    least = _LEAST_SHARE * now.total
    changes = [one for one in _changes(model, state, args, tokens, now, shorter) if one.saved >= least]
    told = ", ".join(f"{one.what} saves {describe_bytes(one.saved)}" for one in changes[:_MOST_CHANGES])
    return HardwareError(
        got=got,
        need=f"One pass of {tokens:,} tokens takes {describe_bytes(now.total)} by the estimate: {describe(now)}.",
        fix=f"Change, cheapest first: {told}." if told else "Take a GPU with more memory.",
    )


def _predicted(
    model: Any,
    state: ModelState,
    args: TrainingArguments,
    tokens: int,
    *,
    plan: RecomputePlan | None = None,
    optim: str | None = None,
) -> MemoryEstimate:
    """What a step takes, of all devices of a model that is split."""
    plans = state.plans
    plan = plan or (plans[0] if len(plans) == 1 else RecomputePlan(tokens, sum(one.layers for one in plans)))
    return predicted_bytes(model, tokens, plan, optim or str(getattr(args.optim, "value", args.optim)))


def _changes(
    model: Any, state: ModelState, args: TrainingArguments, tokens: int, now: MemoryEstimate, shorter: Shorter
) -> Iterator[Change]:
    """The cheapest first: what trains the same, then what changes the weights' precision, then what is trained."""
    eight_bit = _predicted(model, state, args, tokens, optim="adamw_8bit")
    yield Change('optim="adamw_8bit"', now.total - eight_bit.total)
    if state.recompute not in ("offload", "unsloth"):
        plan = offload_plan(model, tokens, psutil.virtual_memory().available)
        offloaded = _predicted(model, state, args, tokens, plan=plan)
        yield Change('use_gradient_checkpointing="offload"', now.total - offloaded.total)
    if not state.full_finetuning:
        yield Change("load_in_4bit=True", _saved_by_4_bits(model, state))
    yield Change(
        f"half the {shorter.setting}", now.total - _predicted(model, state, args, shorter.tokens).total
    )
    if state.full_finetuning:
        yield Change("full_finetuning=False (LoRA)", now.gradients + now.optimizer + now.trainable // 2)
    else:
        yield Change("half the r of get_peft_model", (now.gradients + now.optimizer + now.trainable) // 2)


def _saved_by_4_bits(model: Any, state: ModelState) -> int:
    packed = Precision("4bit", state.precision.dtype)
    before, after = (measure_parts(model.config, one) for one in (state.precision, packed))
    if before is None or after is None:
        return 0
    sizes = [sum(p.weights for p in (of.embedding, *of.layers, of.head)) for of in (before, after)]
    return sizes[0] - sizes[1]
