"""Which layout of frozen weights and LoRA factors multiplies fastest: figures behind docs/decisions/0002.

    python -m benchmarks.gemm_layouts            # 8B shapes, 8,192 tokens, rank 16

For each projection group of a Llama-8B layer: the products of the base weights one by one, stacked in one matrix,
and stacked with the LoRA A rows below them (so that one product gives the outputs and x A^T); the same for dX; and
the thin products that LoRA adds. Median of 20 runs after 5, in microseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from benchmarks import device


def timed(function: Callable[[], object]) -> float:
    """Median time of ``function`` in microseconds."""
    return 1e3 * device.timed(function, runs=20)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def group(name: str, tokens: int, k: int, outs: list[int], rank: int) -> dict[str, float]:
    """One group of projections that read the same input of width ``k``."""
    n, r = sum(outs), rank * len(outs)
    padded = -(-r // 64) * 64
    x = randn(tokens, k)
    separate = [randn(out, k) for out in outs]
    stacked = randn(n, k)
    result: dict[str, float] = {}
    result["fwd separate"] = timed(lambda: [x @ w.T for w in separate])
    result["fwd stacked"] = timed(lambda: x @ stacked.T)
    grads = [randn(tokens, out) for out in outs]
    result["dX separate"] = timed(lambda: [g @ w for g, w in zip(grads, separate, strict=True)])
    dy = randn(tokens, n)
    result["dX stacked"] = timed(lambda: dy @ stacked)
    for label, rows in (("+r", r), ("+64", padded)):
        extended = randn(n + rows, k)
        result[f"fwd stacked{label}"] = timed(lambda w=extended: x @ w.T)
        wide = randn(tokens, n + rows)
        result[f"dX stacked{label}"] = timed(lambda g=wide, w=extended: g @ w)
    a, b, t = randn(r, k), randn(n, rank), randn(tokens, r)
    result["x A^T"] = timed(lambda: x @ a.T)
    result["dA = t^T x"] = timed(lambda: t.T @ x)
    one = t[:, :rank].contiguous()
    result["dB = dY^T t"] = timed(lambda: dy.T @ one)
    result["t^T dY (dB transposed)"] = timed(lambda: one.T @ dy)
    result["dY B"] = timed(lambda: dy @ b)
    result["y += t B^T"] = timed(lambda: torch.addmm(dy, one, b.T, out=dy))
    return {"group": name, **{key: round(value, 1) for key, value in result.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    h, i, kv = 4096, 14336, 1024
    shapes = {"qkv": (h, [h, kv, kv]), "o": (h, [h]), "gate_up": (h, [i, i]), "down": (i, [h])}
    for name, (k, outs) in shapes.items():
        print("RESULT " + json.dumps(group(name, options.tokens, k, outs, options.rank)), flush=True)
    big = torch.empty(2**28, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(big)
    us = timed(lambda: other.copy_(big))
    print(
        "RESULT "
        + json.dumps(
            {"copy_TBps": round(4 * big.numel() / us / 1e6, 2), "device": torch.cuda.get_device_name()}
        )
    )


if __name__ == "__main__":
    main()
