"""What is measured: rows of work, and who does each of them in which mode.

A row is one kind of work; a case is one row done by one framework, in a process of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

PEERS = ("unsloth", "liger", "hf")
# Words of FastLanguageModel.from_pretrained for each precision.
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": dict(load_in_16bit=True),
    "nf4": dict(load_in_4bit=True),
    "nf4-kept": dict(load_in_4bit=True, keep_dequantized=True),  # ours alone
    "int8": dict(load_in_8bit=True),
    "fp8": dict(load_in_fp8=True),
    "float32": dict(load_in_4bit=False, dtype="float32"),
}


class Mode(NamedTuple):
    """How one side does a row.

    Attributes:
        precision: a key of ``PRECISIONS``.
        recompute: ``"auto"`` (ours decides; a peer's default), True, False, or ours only ``"offload"``. Unsloth's way
            to recompute is its own, which offloads.
    """

    precision: str
    recompute: bool | str


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
        title: what the table says.
        ours: our mode.
        peers: the mode of everyone else.
        kind: ``"step"`` (rows of one length), ``"ragged"`` (samples of Alpaca's lengths through a trainer),
            ``"longest"`` (the longest sequence that trains) or ``"decode"`` (generation).
        seq: tokens per row; of the prompt for ``"decode"``.
        batch: rows per forward.
        accumulation: micro-batches per optimizer step.
    """

    title: str
    ours: Mode
    peers: Mode
    kind: str = "step"
    seq: int = 2048
    batch: int = 4
    accumulation: int = 1


_DEFAULT = Mode("bf16", "auto")
ROWS = {
    "default": Row("2048 x 4, bf16, everyone at default", _DEFAULT, _DEFAULT),
    "no-recompute": Row("2048 x 4, bf16, nobody recomputes", Mode("bf16", False), Mode("bf16", False)),
    # Unsloth's way of recompute keeps what it keeps on the host; so does this mode of ours.
    "full-recompute": Row("2048 x 4, bf16, everyone recomputes", Mode("bf16", "offload"), Mode("bf16", True)),
    "fp8": Row("2048 x 4, ours with an FP8 base, peers bf16 at default", Mode("fp8", "auto"), _DEFAULT),
    "nf4": Row("2048 x 4, NF4, everyone at default", Mode("nf4", "auto"), Mode("nf4", "auto")),
    "nf4-kept": Row("2048 x 4, NF4, ours kept in 16 bits too", Mode("nf4-kept", "auto"), Mode("nf4", "auto")),
    "nf4-small": Row("2048 x 4, NF4, least memory", Mode("nf4", "offload"), Mode("nf4", True)),
    "long": Row("8192 x 2, bf16, everyone at default", _DEFAULT, _DEFAULT, seq=8192, batch=2),
    "ragged": Row(
        "samples of Alpaca's lengths, NF4, 2 x 4 a step, through a trainer",
        Mode("nf4", "auto"),
        Mode("nf4", "auto"),
        kind="ragged",
        batch=2,
        accumulation=4,
    ),
    "longest": Row(
        "longest sequence, NF4, least memory",
        Mode("nf4", "offload"),
        Mode("nf4", True),
        kind="longest",
        seq=131072,
        batch=1,
    ),
    "decode-1": Row(
        "128 new tokens after 128, bf16, batch 1", _DEFAULT, _DEFAULT, "decode", seq=128, batch=1
    ),
    "decode-32": Row(
        "128 new tokens after 128, bf16, batch 32", _DEFAULT, _DEFAULT, "decode", seq=128, batch=32
    ),
}


@dataclass(frozen=True)
class Case:
    """One process's work: a row done by one framework.

    Attributes:
        row: the row's name.
        kind: as in ``Row``, or ``"limit"``.
        who: ``"ours"`` (the whole trainer), ``"ours-loop"`` (the peers' plain loop), a peer, or ``"limit"``.
        model: folder of the checkpoint.
        precision: a key of ``PRECISIONS``.
        recompute: as in ``Mode``.
        seq: tokens per row.
        batch: rows per forward.
        accumulation: micro-batches per optimizer step.
        steps: optimizer steps; the first third is warm-up.
        samples: rows of the ragged data.
        new_tokens: tokens that are generated.
        memory_gib: pretend the GPU has no more than this.
        adapter: generate with a LoRA adapter attached.
        kernels: ours only: ``"auto"`` or ``"off"``.
        lora_dropout: share of the adapters' input that is dropped, for ours and peers alike.
        profile: add the kernels of one step.
    """

    row: str
    kind: str
    who: str
    model: str
    precision: str = "bf16"
    recompute: bool | str = "auto"
    seq: int = 2048
    batch: int = 4
    accumulation: int = 1
    steps: int = 15
    samples: int = 1000
    new_tokens: int = 128
    memory_gib: float | None = None
    adapter: bool = False
    kernels: str = "auto"
    lora_dropout: float = 0.0
    profile: bool = False

    @property
    def warm(self) -> int:
        """Optimizer steps before the clock starts."""
        return max(1, self.steps // 3)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What the command line sets for all rows; None leaves a row's own value."""

    model: str
    peers: tuple[str, ...] = ()
    steps: int = 15
    samples: int = 1000
    new_tokens: int = 128
    seq: int | None = None
    batch: int | None = None
    precision: str | None = None
    memory_gib: float | None = None
    adapter: bool = False
    profile: bool = False
    limit: bool = True


def cases_of(name: str, settings: Settings) -> list[Case]:
    """The cases of row ``name`` in the order in which one round runs them."""
    row = ROWS[name]
    shared: dict[str, Any] = dict(
        row=name,
        kind=row.kind,
        model=settings.model,
        seq=settings.seq or row.seq,
        batch=settings.batch or row.batch,
        accumulation=row.accumulation,
        steps=settings.steps,
        samples=settings.samples,
        new_tokens=settings.new_tokens,
        memory_gib=settings.memory_gib,
        adapter=settings.adapter,
    )
    if row.kind == "ragged":
        shared["steps"] = settings.samples // (shared["batch"] * shared["accumulation"])

    def case(who: str, mode: Mode, **more: Any) -> Case:
        precision = settings.precision or mode.precision
        return Case(who=who, precision=precision, recompute=mode.recompute, **{**shared, **more})

    ways = {"step": ("ours", "ours-loop"), "longest": ("ours-loop",)}.get(row.kind, ("ours",))
    peers = settings.peers
    if (
        row.kind == "decode"
    ):  # plain transformers, compiled with a static cache and not, is always beside ours
        peers = ("hf-static", "hf-dynamic", *(peer for peer in peers if peer == "unsloth"))
    cases = [case(who, row.ours, profile=settings.profile and who == "ours") for who in ways]
    cases += [case(peer, row.peers) for peer in peers]
    if row.kind == "step" and settings.limit:
        cases.append(case("limit", row.ours, kind="limit"))
    return cases
