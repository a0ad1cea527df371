"""A plan in words: what is done, why, and what the next best would be."""

from __future__ import annotations

import math

from pantheraml.devices.known_gpus import GIB
from pantheraml.devices.plan import PlanChoice, PlanRequest


def title_of(model: str, request: PlanRequest) -> str:
    """``plan of llama-70b for 8 x NVIDIA H200 (138.9 GiB each), rows of up to 4,096 tokens``."""
    gpus = request.gpus
    least = min(gpu.memory for gpu in gpus) / GIB
    names = " and ".join(dict.fromkeys(gpu.name for gpu in gpus))
    return f"plan of {model} for {len(gpus)} x {names} ({least:.1f} GiB each), rows of up to {request.seq:,} tokens"


def describe_choice(request: PlanRequest, choice: PlanChoice) -> dict[str, str]:
    """The choice line by line: "plan", "why", "a step", "speed" and, where there is one, "runner-up"."""
    plan, runner_up = choice.plan, choice.runner_up
    layers, again = len(request.parts.layers), sum(plan.work.recomputing)
    rows, times = plan.rows, plan.work.micro_batches
    lines = {
        "plan": plan.layout.describe(),
        "why": f"{choice.reason}.",
        "a step": f"{rows} row{'s' * (rows > 1)} at a time, {times} time{'s' * (times > 1)}; "
        f"{again or 'none'} of {layers} layers recompute; memory is fullest at {plan.fullest.moment}",
        "speed": f"about {_round(plan.time.tokens_per_second):,} tokens/s by a simple model",
    }
    if runner_up is not None:
        ratio = runner_up.time.tokens_per_second / plan.time.tokens_per_second
        lines["runner-up"] = (
            f"{runner_up.layout.describe()}: {ratio:.2f} of that speed, {runner_up.fullest.reserved / GIB:.1f} GiB"
        )
    return lines


def _round(speed: float) -> int:
    """Two digits, which is more than the model knows."""
    digits = max(0, int(math.log10(max(speed, 1))) - 1)
    return int(round(speed, -digits))
