"""Versions that are known not to work, beside the ranges that the package itself asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class KnownBad:
    """Versions of a package that are known to fail.

    Attributes:
        package: as pip calls it.
        versions: the bad ones, as pip writes ranges; empty for all.
        why: what happens, as a clause.
        fix: what to type.
        beside: they are bad only with these versions of other packages.
        where: ``"no gpu"``: they are bad only on machines without one.
        state: ``"note"`` for what breaks nothing of ours.
    """

    package: str
    versions: str
    why: str
    fix: str
    beside: Mapping[str, str] = field(default_factory=dict)
    where: Literal["anywhere", "no gpu"] = "anywhere"
    state: Literal["bad", "note"] = "bad"


_UNUSED = "Type pip uninstall {}: PantheraML does not use it."

KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        "triton",
        "!=3.6.*",
        "torch 2.11 compiles by triton 3.6",
        "Type pip install 'triton==3.6.*'.",
        beside={"torch": "==2.11.*"},
    ),
    KnownBad(
        "triton",
        "!=3.7.*",
        "torch 2.12 and 2.13 compile by triton 3.7",
        "Type pip install 'triton>=3.7.1,<3.8'.",
        beside={"torch": ">=2.12,<2.14"},
    ),
    KnownBad(
        "triton",
        "==3.6.0",
        "its interpreter (TRITON_INTERPRET=1) breaks on loops with NumPy 2.4 and newer",
        "Type pip install 'triton>=3.7.1,<3.8', or pip install 'numpy<2.4', to run kernels without a GPU.",
        beside={"numpy": ">=2.4"},
        where="no gpu",
        state="note",
    ),
    KnownBad(
        "trl",
        ">=1.15,<1.16",
        "it launches a Triton kernel wherever Triton is installed, GPU or not",
        "Type pip install 'trl>=1.16', or pip uninstall triton.",
        beside={"triton": ""},
        where="no gpu",
    ),
    KnownBad(
        "xformers",
        "==0.0.35",
        "it is built for torch 2.10, and its operators do not load with another",
        _UNUSED.format("xformers"),
        beside={"torch": "!=2.10.*"},
        state="note",
    ),
    KnownBad(
        "vllm",
        ">=0.27.1,<0.33",
        "it is built for torch 2.13.0",
        "Type pip install 'torch==2.13.0', or give vllm an environment of its own.",
        beside={"torch": "!=2.13.0"},
    ),
    KnownBad(
        "vllm",
        ">=0.33",
        "it needs torch 2.14, which is not supported yet",
        "Type pip install 'vllm<0.33', or give vllm an environment of its own.",
    ),
)
