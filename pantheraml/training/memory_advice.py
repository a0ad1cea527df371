"""What to change where a step does not fit, with what each change would save by the estimate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
from transformers import TrainingArguments

from pantheraml.devices.memory import describe_bytes
from pantheraml.errors import HardwareError
from pantheraml.models.memory_estimate import MemoryEstimate, predicted_bytes
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


def out_of_memory_error(got: str, model: Any, args: TrainingArguments, tokens: int) -> HardwareError:
    """The error of a run that cannot go on.

    Args:
        got: what happened, as a sentence.
        model: what is trained.
        args: of the run.
        tokens: of the smallest pass: one row.
    """
    now = _predicted(model, args, tokens)
    changes = [
        change for change in _changes(model, args, tokens, now) if change.saved >= _LEAST_SHARE * now.total
    ]
    told = ", ".join(f"{one.what} saves {describe_bytes(one.saved)}" for one in changes[:_MOST_CHANGES])
    return HardwareError(
        got=got,
        need=f"One pass of {tokens:,} tokens takes {describe_bytes(now.total)} by the estimate: {now.describe()}.",
        fix=f"Change, cheapest first: {told}." if told else "Take a GPU with more memory.",
    )


def _predicted(
    model: Any,
    args: TrainingArguments,
    tokens: int,
    plan: RecomputePlan | None = None,
    optim: str | None = None,
) -> MemoryEstimate:
    """What a step takes, of all devices of a model that is split."""
    state = get_state(model)
    plans = () if state is None else state.plans
    plan = plan or (plans[0] if len(plans) == 1 else RecomputePlan(tokens, sum(one.layers for one in plans)))
    return predicted_bytes(model, tokens, plan, optim or str(getattr(args.optim, "value", args.optim)))


def _changes(model: Any, args: TrainingArguments, tokens: int, now: MemoryEstimate) -> Iterator[Change]:
    """The cheapest first: of the same training, then of the weights' precision, then of what is trained."""
    state = get_state(model)
    eight_bit = _predicted(model, args, tokens, optim="adamw_8bit")
    yield Change('optim="adamw_8bit"', now.optimizer - eight_bit.optimizer)
    if state is None or state.recompute not in ("offload", "unsloth"):
        plan = offload_plan(model, tokens, psutil.virtual_memory().available)
        saved = now.activations - _predicted(model, args, tokens, plan).activations
        yield Change('use_gradient_checkpointing="offload"', saved)
    if state is not None and not state.full_finetuning:
        yield Change("load_in_4bit=True", _saved_by_4_bits(model, state))
    half = max(1, tokens // 2)
    yield Change(f"max_seq_length={half}", now.activations - _predicted(model, args, half).activations)
    if state is None or state.full_finetuning:
        yield Change("full_finetuning=False (LoRA)", now.gradients + now.optimizer)
    else:
        yield Change("half the r of get_peft_model", (now.gradients + now.optimizer) // 2)


def _saved_by_4_bits(model: Any, state: ModelState) -> int:
    packed = Precision("4bit", state.precision.dtype)
    before, after = (measure_parts(model.config, one) for one in (state.precision, packed))
    if before is None or after is None:
        return 0
    sizes = [sum(p.weights for p in (of.embedding, *of.layers, of.head)) for of in (before, after)]
    return sizes[0] - sizes[1]
