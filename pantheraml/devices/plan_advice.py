"""The error of a plan that cannot be: the cheapest changes, and what each would save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pantheraml.devices.known_gpus import GIB
from pantheraml.devices.model_parts import ModelParts
from pantheraml.errors import ConfigError

if TYPE_CHECKING:
    from pantheraml.devices.plan import PlanRequest

_MOST_CHANGES = 3
# Changes that save less than this share are not worth a word.
_LEAST_SHARE = 0.01


class NothingFits(ConfigError):
    """No layout of what was asked for fits."""


def nothing_fits(
    request: PlanRequest,
    least: int,
    least_of: Callable[[PlanRequest], int],
    alternatives: Mapping[str, Callable[[], ModelParts | None]],
) -> NothingFits:
    """The error where no layout fits.

    Args:
        request: what was planned.
        least: bytes that the best layout needs of a GPU.
        least_of: the same for another request.
        alternatives: as in ``choose_plan``.
    """
    told: list[str] = []
    for what, changed in _changes(request, alternatives):
        saved = least - least_of(changed)
        if saved >= _LEAST_SHARE * least and len(told) < _MOST_CHANGES:
            enough = "" if least - saved > request.limit else ", which is enough"
            told.append(f"{what} saves {saved / GIB:.1f} GiB of each GPU{enough}")
    count = len(request.gpus)
    return NothingFits(
        got=f"Nothing fits on {count} x {request.gpus[0].name}: the best layout needs {least / GIB:.1f} GiB of each "
        f"GPU, and {request.limit / GIB:.1f} may be taken.",
        need=f"What is trained, its states and one row of {request.seq:,} tokens must fit, with "
        f"{'nothing' if request.recompute is False else 'all layers'} recomputing.",
        fix=f"Change, cheapest first: {'; '.join(told)}." if told else "Take more GPUs, or larger ones.",
    )


def _changes(
    request: PlanRequest, alternatives: Mapping[str, Callable[[], ModelParts | None]]
) -> Iterator[tuple[str, PlanRequest]]:
    """The cheapest first: what trains the same, then what trains something else, then other GPUs."""
    if request.recompute is False:
        yield "recomputing (use_gradient_checkpointing='auto')", replace(request, recompute="auto")
    if request.strategy is not None:
        yield "leaving the strategy out", replace(request, strategy=None)
    if "8bit" not in request.optim:
        yield "the optimizer adamw_8bit", replace(request, optim="adamw_8bit")
    if not request.offload and len(request.gpus) > 1:
        yield "cpu_offload=True (--offload; shards in host memory, slow)", replace(request, offload=True)
    for what, measure in alternatives.items():
        parts = measure()
        if parts is not None:
            yield what, replace(request, parts=parts)
    if request.seq > 1:
        yield f"rows of {request.seq // 2:,} tokens", replace(request, seq=request.seq // 2)
    yield f"{2 * len(request.gpus)} GPUs", replace(request, gpus=request.gpus * 2)
