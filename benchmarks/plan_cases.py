"""The runs of the plan grid: small shapes of four families, four methods, two lengths, three ways to recompute."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from benchmarks.shapes import LLAMA_8B, TINY

_COMMON = dict(max_position_embeddings=32768, pad_token_id=0, bos_token_id=1, eos_token_id=2)
# Few layers of real widths: what a run takes of a GPU is mostly activations, so that an error in them shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_8B | dict(num_hidden_layers=6),
    "qwen3": dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=10, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "gemma2": dict(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, query_pre_attn_scalar=256,
    ),
    "mistral": LLAMA_8B | dict(num_hidden_layers=6, vocab_size=32768, sliding_window=None),
}  # fmt: skip
_TINY = {name: size for name, size in TINY.items() if size != LLAMA_8B[name]}
METHODS = ("lora", "qlora", "fp8", "full")
RECOMPUTE: tuple[bool | str, ...] = ("auto", True, False)
# Rows x tokens of a micro-batch; the smoke test's for the tiny shape.
LENGTHS = ((4, 2048), (1, 16384))
TINY_LENGTHS = ((2, 16), (1, 48))


@dataclass(frozen=True)
class PlanCase:
    """One run.

    Attributes:
        family: of ``FAMILIES``.
        method: of ``METHODS``.
        rows: of a micro-batch.
        seq: tokens of a row.
        recompute: as ``use_gradient_checkpointing``.
        strategy: of ``MultiGPUConfig``; ``"none"`` for one GPU.
    """

    family: str
    method: str
    rows: int
    seq: int
    recompute: bool | str
    strategy: str = "none"

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.family} {self.method} {self.seq} x {self.rows}, recompute {self.recompute}"


def config_of(family: str, shape: str) -> Any:
    """The configuration of transformers of a ``"real"`` or a ``"tiny"`` shape."""
    from transformers import AutoConfig

    sizes = FAMILIES[family] | (_TINY if shape == "tiny" else {})
    return AutoConfig.for_model(family, **{**_COMMON, **sizes})


def grid(families: list[str], methods: list[str], strategies: list[str], shape: str) -> list[PlanCase]:
    """Six runs of each family and strategy: every method once, two of them at the other length, too.

    Lengths and ways to recompute go round, from family to family in another order, so that all of them meet.
    """
    lengths = TINY_LENGTHS if shape == "tiny" else LENGTHS
    found: list[PlanCase] = []
    for family in families:
        number = list(FAMILIES).index(family)  # the same runs, whichever families are asked for together
        wanted = list(islice(cycle(methods), min(6, 2 * len(methods))))
        for strategy in strategies:
            for index, method in enumerate(wanted):
                rows, seq = lengths[(index + index // len(methods) + number) % 2]
                recompute = RECOMPUTE[(index + number) % len(RECOMPUTE)]
                found.append(PlanCase(family, method, rows, seq, recompute, strategy))
    return found
