"""Attention backends of the table on one GPU: forward, and forward and backward, in TFLOP/s and milliseconds.

    python -m benchmarks.attention                              # every case and backend that works here
    python -m benchmarks.attention --case packed --backend flash-attn-4 torch-flash

bfloat16, causal. FLOPs count the pairs of tokens that see each other: 4 x heads x head_dim a pair forward, 3.5 times
that forward and backward. Median of 10 runs after 3. "first call" contains the probe and what flash-attn-4 and flex
compile; flex runs where asked for by name or where there is a soft-cap, ``plain`` only by name. ``err`` is the largest
difference from the formula in float64 over the first document, output and gradients, over the largest number.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import torch

from benchmarks.device import timed
from pantheraml.kernels.attention import AttentionCall, Layout, table
from pantheraml.kernels.attention.attend import backward, forward
from pantheraml.kernels.attention.backend import AttentionBackend
from pantheraml.kernels.attention.plain import Plain


@dataclass(frozen=True)
class Case:
    """Rows (equal lengths) or documents of one packed row, and what a model adds."""

    lengths: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    packed: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key it sees."""
        reach = self.window or max(self.lengths)
        return sum(min(i + 1, reach) for n in self.lengths for i in range(n))


def ragged(total: int = 16384) -> tuple[int, ...]:
    draw, lengths = random.Random(0), []
    while sum(lengths) < total:
        lengths.append(min(draw.choice([96, 160, 300, 700, 1500, 2600]), total - sum(lengths)))
    return tuple(lengths)


CASES = {
    "4x2048": Case((2048,) * 4),
    "1x8192": Case((8192,)),
    "packed": Case(ragged(), packed=True),
    "gemma2": Case((2048,) * 4, heads=16, kv_heads=8, head_dim=256, softcap=50.0),
    "gemma2-window": Case((8192,), heads=16, kv_heads=8, head_dim=256, softcap=50.0, window=4096),
    "gpt_oss": Case((2048,) * 4, heads=64, head_dim=64, sinks=True),
    "gpt_oss-window": Case(ragged(), heads=64, head_dim=64, sinks=True, window=128, packed=True),
}


def example(case: Case):
    """The call, q, k, v, dout and sinks of a case."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows, tokens = (1, sum(case.lengths)) if case.packed else (len(case.lengths), case.lengths[0])
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(
            rows, tokens, heads, case.head_dim, device=device, dtype=torch.bfloat16, generator=generator
        )
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    layout = None
    if case.packed:
        offsets = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0)], dtype=torch.int32, device=device)
        layout = Layout((rows, tokens), device, offsets, max(case.lengths))
    sinks = torch.linspace(-2, 2, case.heads, device=device) if case.sinks else None
    call = AttentionCall.of(q, k, layout, None, case.window, case.softcap, case.sinks)
    return call, (q, k, v), dout, sinks


def run(backend: AttentionBackend, call: AttentionCall, heads, dout, sinks):
    out, kept = forward(backend, *heads, call, sinks)
    return (out, *backward(backend, dout, heads, out, kept, call, sinks)[:3])


def error(backend: AttentionBackend, case: Case, call: AttentionCall, heads, dout, sinks) -> float:
    """Largest error over the first document, or the first 2,048 tokens of the first row."""
    length = min(case.lengths[0], 2048)
    few = case.heads // case.kv_heads  # the query heads of the first key head
    alone = [t[:1, :length, : few if t.shape[2] == case.heads else 1].double() for t in (*heads, dout)]
    short = AttentionCall.of(alone[0], alone[1], None, call.scale, case.window, case.softcap, case.sinks)
    right = run(Plain(), short, tuple(alone[:3]), alone[3], None if sinks is None else sinks[:few].double())
    # keys of a longer row get gradients from later queries too: compare those of documents as a whole
    whole = length == case.lengths[0]
    ours = run(backend, call, heads, dout, sinks)
    return max(
        ((a[:1, :length, : b.shape[2]].double() - b).abs().max() / b.abs().max()).item()
        for a, b in list(zip(ours, right, strict=True))[: 4 if whole else 2]
    )


def measure(name: str, case: Case, backend: AttentionBackend, wanted: list[str] | None) -> str:
    call, heads, dout, sinks = example(case)
    label = f"| {name} | {backend.name} |"
    if backend.name == "plain" and not wanted:
        return f"{label} - | - | - | - | only by name |"
    if backend.name == "flex" and not wanted and case.softcap is None:
        return f"{label} - | - | - | - | only by name here |"
    begin = time.perf_counter()
    reason = backend.why_not(call)
    if reason:
        return f"{label} - | - | - | - | {reason} |"
    wrong = error(backend, case, call, heads, dout, sinks)
    ready = time.perf_counter() - begin
    once = timed(lambda: forward(backend, *heads, call, sinks), runs=10, warm=3)
    both = timed(lambda: run(backend, call, heads, dout, sinks), runs=10, warm=3)
    flops = 4 * case.heads * case.head_dim * case.pairs / 1e9
    speeds = f"{flops / once:.0f} / {3.5 * flops / both:.0f} | {once:.3f} | {both:.3f}"
    return f"{label} {speeds} | {wrong:.1e} | first call {ready:.1f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--backend", nargs="*", choices=[backend.name for backend in table.DENSE])
    asked = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| case | backend | TFLOP/s forward / both | forward ms | both ms | err | |")
    print("|---|---|---|---|---|---|---|")
    for name in asked.case:
        for backend in table.PACKED if CASES[name].packed else table.DENSE:
            if not asked.backend or backend.name in asked.backend:
                print(measure(name, CASES[name], backend, asked.backend), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
