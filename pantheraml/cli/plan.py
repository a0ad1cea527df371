"""``pantheraml plan``: what a run would take of GPUs that need not be here, from the model's configuration alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pantheraml.devices.known_gpus import GIB, read_gpus
from pantheraml.devices.layout import Spread
from pantheraml.devices.model_parts import ModelParts
from pantheraml.devices.peak_memory import COMPONENTS
from pantheraml.devices.plan import Plan, PlanChoice, PlanRequest, choose_plan
from pantheraml.devices.plan_words import describe_choice
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.models.optimal_config import check_method, parts_of, smaller_parts, unknown_architecture

if TYPE_CHECKING:
    from pantheraml.training.probe import Probe

# By how much stored weights may differ from those that are counted: a head that is stored beside its embedding, say.
_FAR = 0.02
_RECOMPUTE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "true": True, "false": False}


@dataclass(frozen=True)
class PlanOptions:
    """The words of the command; see ``pantheraml plan --help``."""

    model: str
    gpus: str
    method: str = "lora"
    seq: int = 2048
    batch: int | None = None
    optim: str = "adamw_torch_fused"
    strategy: str | None = None
    recompute: str = "auto"
    rank: int = 16
    offload: bool = False


def plan_of(options: PlanOptions) -> tuple[PlanRequest, PlanChoice]:
    """What was asked, and the plan for it.

    Raises:
        ConfigError: words that cannot be, or nothing fits.
        ModelLoadError: no configuration, or of an architecture that no family describes.
    """
    check_method("--method", options.method)
    if options.recompute not in _RECOMPUTE:
        raise ConfigError(
            got=f"--recompute {options.recompute!r} was given.",
            need=f"It is one of {', '.join(_RECOMPUTE)}.",
            fix="Leave it out for auto.",
        )
    gpus = read_gpus(options.gpus)
    from pantheraml.models.loading import load_config
    from pantheraml.models.source import resolve_config

    config = load_config(resolve_config(options.model))
    parts = parts_of(config, options.method, options.rank)
    if parts is None:
        raise unknown_architecture(options.model)
    request = PlanRequest(
        parts,
        gpus,
        options.seq,
        options.batch,
        options.optim,
        _RECOMPUTE[options.recompute],
        cast("Spread | None", options.strategy),
        options.offload,
    )
    smaller = smaller_parts(config, options.method, options.rank)
    return request, choose_plan(request, {f"--method {one}": parts for one, parts in smaller.items()})


def stored_note(model: str, parts: ModelParts) -> str | None:
    """What the headers of the weights say where they are here and say something else than the configuration."""
    from pantheraml.models.tensor_header import BadHeader, read_header

    files = sorted(Path(model).expanduser().glob("model*.safetensors"))
    try:
        tensors = {name: one for file in files for name, one in read_header(file).items()}
    except BadHeader as error:
        return f"a file of the weights {error}."
    stored = sum(math.prod(one.shape) for one in tensors.values())
    counted = sum(part.numbers for part in parts.all)
    is_packed = any(one.dtype in ("U8", "I8") for one in tensors.values())
    if not tensors or is_packed or abs(stored - counted) <= _FAR * counted:
        return None
    return f"the files hold {stored:,} numbers, the configuration asks for {counted:,}: is it theirs?"


@dataclass(frozen=True)
class Probed:
    """What a probe came to.

    Attributes:
        probe: what was measured; None where it was not.
        reason: why not, then.
    """

    probe: Probe | None = None
    reason: str = ""


def probe_plan(
    options: PlanOptions, request: PlanRequest, choice: PlanChoice
) -> tuple[PlanRequest, PlanChoice, Probed]:
    """The request with what two real steps measured, and the plan by it; unchanged without a GPU.

    Raises:
        ConfigError: the GPU that is here does not train the model by itself, or by what was measured nothing fits.
    """
    from pantheraml.training.probe import probe

    try:
        found = probe(options.model, options.method, options.rank, request, choice.plan)
    except HardwareError as error:
        return request, choice, Probed(None, str(error))
    request = replace(request, measured=found.ratio)
    return request, choose_plan(request), Probed(found)


def as_json(
    options: PlanOptions, request: PlanRequest, choice: PlanChoice, probed: Probed | None = None
) -> str:
    """The choice for machines; sizes in bytes."""
    runner_up = choice.runner_up
    said = {
        **asdict(options),
        "gpu": {"name": request.gpus[0].name, "memory": request.gpus[0].memory, "count": len(request.gpus)},
        "limit": int(choice.limit),
        "reason": choice.reason,
        "plan": _plan_as_json(choice.plan),
        "runner_up": None if runner_up is None else _plan_as_json(runner_up),
        "note": stored_note(options.model, request.parts),
        "probe": None if probed is None else _probe_as_json(probed),
        "does_not_fit": [{**asdict(layout), "least": size} for layout, size in choice.others.items()],
    }
    return json.dumps(said, indent=1)


def _plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan.layout),
        "micro_batch_rows": plan.rows,
        "micro_batches": plan.work.micro_batches,
        "recomputing_layers": list(plan.work.recomputing),
        "tokens_per_second": round(plan.time.tokens_per_second),
        "memory": [
            {**one.parts(), "allocated": one.total, "reserved": one.reserved, "moment": one.moment}
            for one in plan.memory
        ],
    }


def _probe_as_json(probed: Probed) -> dict[str, Any]:
    if probed.probe is None:
        return {"reason": probed.reason}
    one = probed.probe
    return {
        **asdict(one),
        "estimated": {
            **one.estimated.parts(),
            "allocated": one.estimated.total,
            "moment": one.estimated.moment,
        },
        "ratio": one.ratio,
    }


def draw(options: PlanOptions, request: PlanRequest, choice: PlanChoice, probed: Probed | None = None) -> Any:
    """The choice for people, as rich prints it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    gpu, count = request.gpus[0], len(request.gpus)
    title = (
        f"{options.model}: {options.method}, rows of {options.seq:,} tokens, {count} x {gpu.name} "
        f"({gpu.memory / GIB:.1f} GiB)"
    )
    note = stored_note(options.model, request.parts)
    lines = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    said = describe_choice(request, choice) | ({"note": note} if note else {})
    if probed is not None:
        said["probe"] = probed.reason if probed.probe is None else f"{probed.probe.describe()}."
    for name, text in said.items():
        lines.add_row(name, text)
    return Group(Text(title, style="bold"), lines, Text(), _memory_table(choice.plan))


def _memory_table(plan: Plan) -> Any:
    """A row for each component, a column for each kind of GPU; GiB."""
    from rich.table import Table

    table = Table(box=None, header_style="dim", padding=(0, 1), pad_edge=False)
    table.add_column("GiB of each GPU", no_wrap=True)
    stages = len(plan.memory)
    for number in range(stages):
        table.add_column("" if stages == 1 else f"stage {number}", justify="right", no_wrap=True)
    parts = [one.parts() for one in plan.memory]
    for name in (name for name in COMPONENTS if any(name in one for one in parts)):
        table.add_row(name, *(f"{one.get(name, 0) / GIB:.2f}" for one in parts))
    table.add_row("allocated", *(f"{one.total / GIB:.2f}" for one in plan.memory), style="cyan")
    table.add_row("on the card", *(f"{one.reserved / GIB:.2f}" for one in plan.memory), style="bold")
    return table
