"""Whether each attention backend of our table runs forward and backward here, and is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding

if TYPE_CHECKING:
    from pantheraml.kernels.attention.backend import AttentionBackend, AttentionCall

NAME = "attention"
# Enough for every backend of the table; heads as small models have them.
_TOKENS, _HEADS, _KEY_HEADS, _HEAD_DIM = 2048, 4, 2, 64


@dataclass(frozen=True)
class Tried:
    """One backend on one kind of rows.

    Attributes:
        backend: its name.
        rows: ``"dense"`` or ``"packed"``.
        outcome: ``"right"``; ``"failed"``: it raised or was wrong, or its package does not load; ``"not here"``.
        reason: why it is not used here, as a clause; empty for one that is right.
    """

    backend: str
    rows: str
    outcome: str
    reason: str = ""


def probe(gpus: int) -> tuple[Tried, ...]:
    """Try each backend on the first GPU, or on the CPU."""
    from pantheraml.kernels.attention.table import DENSE, PACKED

    device = "cuda:0" if gpus else "cpu"
    return (*try_backends(DENSE, device, is_packed=False), *try_backends(PACKED, device, is_packed=True))


def try_backends(backends: Sequence[AttentionBackend], device: str, *, is_packed: bool) -> tuple[Tried, ...]:
    """Let each of ``backends`` attend, as the table's own probe does."""
    call = _example(device, is_packed)
    rows = "packed" if is_packed else "dense"
    return tuple(Tried(backend.name, rows, *_outcome(backend, call)) for backend in backends)


def _outcome(backend: AttentionBackend, call: AttentionCall) -> tuple[str, str]:
    from pantheraml.kernels.attention.package import UNUSABLE
    from pantheraml.kernels.attention.probe import TRIED, failure

    reason = backend.why_not(call)
    if reason is None:
        reason = failure(backend, call.features)
    if reason is None:
        return "right", ""
    return "failed" if reason.startswith((TRIED, UNUSABLE)) else "not here", reason


def _example(name: str, is_packed: bool) -> AttentionCall:
    import torch

    from pantheraml.devices.inventory import pick_dtype
    from pantheraml.kernels.attention.backend import AttentionCall
    from pantheraml.kernels.attention.layout import Layout

    device = torch.device(name)
    q, k = (
        torch.empty(1, _TOKENS, heads, _HEAD_DIM, dtype=pick_dtype(None, device), device=device)
        for heads in (_HEADS, _KEY_HEADS)
    )
    offsets = torch.tensor([0, _TOKENS // 3, _TOKENS], dtype=torch.int32, device=device)
    layout = Layout((1, _TOKENS), device, offsets, _TOKENS - _TOKENS // 3) if is_packed else None
    return AttentionCall.of(q, k, layout)


def judge(facts: tuple[Tried, ...]) -> list[Finding]:
    """A row for each backend that fails, and one for those that are right."""
    found: list[Finding] = []
    for name in dict.fromkeys(one.backend for one in facts):
        failed = [one for one in facts if one.backend == name and one.outcome == "failed"]
        if failed:
            seen = f"{name} ({' and '.join(one.rows for one in failed)} rows): {failed[0].reason}"
            found.append(Finding(NAME, "bad", seen, _fix(name)))
    right = ", ".join(dict.fromkeys(one.backend for one in facts if one.outcome == "right"))
    others: dict[str, dict[str, None]] = {}  # names by reason
    for one in facts:
        if one.outcome == "not here":
            others.setdefault(one.reason, {})[one.backend] = None
    rest = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in others.items())
    found.append(Finding(NAME, "ok", f"right: {right}" + (f" ({rest})" if rest else "")))
    return found


def _fix(name: str) -> str:
    if name == "flex":
        return "Type gcc --version (it compiles: apt install gcc); attention goes on by the others."
    if name.startswith("flash-attn"):
        package = {"flash-attn-4": "flash-attn-4", "flash-attn-3": "flash-attn-3"}.get(name, "flash-attn")
        return f"Type pip uninstall {package}, or install one that is built for this torch; the others go on."
    return "Type pip install --force-reinstall torch, with its own nvidia packages; attention goes on by the others."


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails="Type pip uninstall flash-attn flash-attn-4, or what else is there for attention: one of them kills "
    "its process; torch's own attention goes on.",
    seconds=240,
    counts=True,
)
