"""Frozen weights of few bits: how fast they are unpacked, quantised and multiplied. Figures behind docs/decisions/0002.

    python -m benchmarks.formats                 # 8B shapes, 8,192 tokens
    python -m benchmarks.formats --sweep         # also other tiles of the kernels

Microseconds are medians of 20 runs after 5. GB/s counts every byte read and written once; the copy in the first line is
what the memory gives. NF4: ours against bitsandbytes. FP8: the kernels around the products, and the products by rows
(what is used), by tensor, by blocks where torch offers them, and in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gemm_layouts import timed
from pantheraml.kernels import fp8, fp8_factor, fp8_norm, fp8_product, nf4
from pantheraml.kernels.rms_norm import RMSNorm
from pantheraml.kernels.unpack_table import UnpackTable

H, INNER, KV = 4096, 14336, 1024
# name, N, K, margin of LoRA at r=16: the stacks of a Llama-8B layer
STACKS = [("qkv", H + 2 * KV, H, 48), ("o", H, H, 16), ("gate_up", 2 * INNER, H, 32), ("down", H, INNER, 16)]


def line(what: str, us: float, moved: int = 0, flops: float = 0.0) -> None:
    rate = f"{moved / us / 1e3:9.0f} GB/s" if moved else f"{flops / us / 1e6:9.0f} TFLOP/s" if flops else ""
    print(f"{what:58}{us:9.1f} us{rate}", flush=True)


@contextmanager
def settings(target: dict[str, int], values: dict[str, int]) -> Iterator[None]:
    before = dict(target)
    target.update(values)
    try:
        yield
    finally:
        target.clear()
        target.update(before)


def attempt(what: str, function: Callable[[], Any], moved: int = 0, flops: float = 0.0) -> None:
    """Time ``function``; what does not run here is said in one line."""
    try:
        us = timed(function)
    except Exception as error:
        print(f"{what:58}does not run: {type(error).__name__}: {str(error).splitlines()[0][:90]}", flush=True)
        return
    line(what, us, moved, flops)


def bench_copy() -> None:
    source = torch.empty(2**29, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    line("copy of 512 MiB", timed(lambda: target.copy_(source)), 2 * source.numel())


def bench_nf4(sweep: bool) -> None:
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        print("NF4 left out: bitsandbytes is not installed")
        return
    for name, n, k in (("q, o", H, H), ("k, v", KV, H), ("gate, up", INNER, H), ("down", H, INNER)):
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        moved = n * k * 2 + n * k // 2 + n * k // 64
        wide = torch.empty(n, k + 64, device="cuda", dtype=torch.bfloat16)
        dense = torch.empty(n, k, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(nf4.unpack_4bit(data, state, dense), bnb.dequantize_4bit(data, state))
        attempt(
            f"NF4 {name} ({n} x {k}), bitsandbytes", lambda d=data, s=state: bnb.dequantize_4bit(d, s), moved
        )
        attempt(f"NF4 {name}, ours", lambda d=data, s=state, o=dense: nf4.unpack_4bit(d, s, o), moved)
        attempt(
            f"NF4 {name}, ours, into a stack",
            lambda d=data, s=state, o=wide[:, :k]: nf4.unpack_4bit(d, s, o),
            moved,
        )
        if sweep and name == "gate, up":
            for words in (128, 256, 512, 1024, 2048):
                for warps in (2, 4, 8):
                    with settings(nf4.TILE, {"WORDS": words, "num_warps": warps}):
                        attempt(
                            f"    {words} words, {warps} warps",
                            lambda d=data, s=state, o=dense: nf4.unpack_4bit(d, s, o),
                            moved,
                        )


def bench_nf4_table() -> None:
    """A layer's seven weights, one launch after another and in one."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return
    shapes = [(H, H), (KV, H), (KV, H), (H, H), (INNER, H), (INNER, H), (H, INNER)]
    weights, targets = [], []
    for n, k in shapes:
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        weights.append(bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True))
        targets.append(torch.empty(n, k + 64, device="cuda", dtype=torch.bfloat16)[:, :k])
    moved = sum(n * k * 2 + n * k // 2 + n * k // 64 for n, k in shapes)
    table = UnpackTable(weights, targets)
    assert table.is_one_launch

    def one_by_one():
        for (data, state), target in zip(weights, targets, strict=True):
            nf4.unpack_4bit(data, state, target)

    for name, call in (("seven launches", one_by_one), ("one launch", table.write)):
        attempt(f"NF4 a layer into stacks, {name}", call, moved)
        line(f"    the host's share of it, {name}", host_time(call))


def host_time(call: Callable[[], Any]) -> float:
    """Microseconds until ``call`` returns, the GPU having nothing else to do: a median of 50."""
    times = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[25] * 1e6


def bench_quantise(tokens: int, sweep: bool) -> None:
    for width, margin in ((H, 48), (INNER, 16), (H + 2 * KV, 48), (2 * INNER, 32)):
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        t = torch.randn(tokens, margin, device="cuda", dtype=torch.bfloat16)
        by, one = torch.rand(width, device="cuda"), torch.ones(1, device="cuda")
        extra = fp8.Margin(t, one, 1.0)
        moved = tokens * (3 * width + 5 * margin)
        attempt(f"FP8 rows of {width}", lambda x=x: fp8.quantise_rows(x), 3 * tokens * width)
        attempt(f"FP8 rows of {width}, margin", lambda x=x, e=extra: fp8.quantise_rows(x, None, e), moved)
        attempt(f"FP8 rows of {width}, columns scaled, margin",
                lambda x=x, e=extra, b=by: fp8.quantise_rows(x, b, e), moved)  # fmt: skip
        if sweep:
            before = fp8._PER_WARP
            for per_warp in (256, 512, 1024, 2048, 4096):
                fp8._PER_WARP = per_warp
                attempt(
                    f"    {per_warp} columns a warp",
                    lambda x=x, e=extra: fp8.quantise_rows(x, None, e),
                    moved,
                )
            fp8._PER_WARP = before
    x, w = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16), torch.rand(H, device="cuda")
    norm, raw = RMSNorm(w, 1e-5), fp8.Margin(x[:, :48].contiguous(), torch.ones(1, device="cuda"), 1.0)
    attempt("norm and FP8 rows", lambda: fp8_norm.norm_rows(x, norm), 3 * tokens * H)
    attempt("norm, FP8 rows and margin", lambda: fp8_norm.norm_rows(x, norm, raw), tokens * (3 * H + 7 * 48))
    attempt("norm, h and FP8 rows", lambda: fp8_norm.norm_rows(x, norm, None, True), 5 * tokens * H)
    for name, n, k, margin in STACKS:
        weight = torch.zeros(n, k + 3 * margin, dtype=torch.uint8, device="cuda").view(fp8.DTYPE)
        out = torch.empty(k, n + 3 * margin, dtype=torch.uint8, device="cuda").view(fp8.DTYPE)
        view = weight[:, :k]
        attempt(f"turn {name}", lambda v=view, o=out, n=n: fp8_product.turn(v, o[:, :n]), 2 * n * k)
        b, scales = (
            torch.randn(n, margin, device="cuda", dtype=torch.bfloat16),
            torch.rand(n, device="cuda") + 0.1,
        )
        factor = fp8_factor.Factor(b, scales, 3.5)
        attempt(f"split B of {name}", lambda f=factor, w=weight, k=k: fp8_factor.split_factor(f, w[:, k:]))
        if sweep and name == "gate_up":
            for tile in (64, 128, 256):
                for warps in (4, 8, 16):
                    with settings(fp8_product._TURN, {"BLOCK_N": tile, "BLOCK_K": tile, "num_warps": warps}):
                        attempt(f"    turn, tiles of {tile}, {warps} warps",
                                lambda v=view, o=out, n=n: fp8_product.turn(v, o[:, :n]), 2 * n * k)  # fmt: skip


def products(name: str, tokens: int, n: int, k: int) -> None:
    """x (tokens, k) times W (n, k) turned."""
    flops = 2.0 * tokens * n * k
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    attempt(f"{name} ({tokens} x {k} x {n}), bfloat16", lambda: x @ w.T, flops=flops)
    xq, wq = fp8.quantise_rows(x), fp8.quantise_rows(w)
    scales = wq.scales.flatten()
    for fast in (True, False):
        fp8_product.FAST_ACCUMULATION = fast
        label = f"{name}, FP8 by rows{'' if fast else ', float32 sums'}"
        attempt(label, lambda: fp8_product.multiply(xq, wq.values, scales), flops=flops)
    fp8_product.FAST_ACCUMULATION = True
    one = torch.ones((), device="cuda")
    given: dict[str, Any] = dict(out_dtype=torch.bfloat16, use_fast_accum=True)
    attempt(
        f"{name}, FP8 by tensor",
        lambda: torch._scaled_mm(xq.values, wq.values.t(), scale_a=one, scale_b=one, **given),
        flops=flops,
    )
    if k % 128 == 0 and n % 128 == 0:
        by_block = torch.rand(k // 128, tokens, device="cuda").t()
        of_weight = torch.rand(n // 128, k // 128, device="cuda").t()
        given = dict(out_dtype=torch.bfloat16)
        attempt(
            f"{name}, FP8 by blocks of 1 x 128 and 128 x 128",
            lambda: torch._scaled_mm(xq.values, wq.values.t(), scale_a=by_block, scale_b=of_weight, **given),
            flops=flops,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", choices=("nf4", "quantise", "products"))
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.tokens} tokens")
    bench_copy()
    if options.only in (None, "nf4"):
        bench_nf4(options.sweep)
        bench_nf4_table()
    reason = fp8_product.why_no_fp8(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        print(f"FP8 left out: {reason}")
        return
    if options.only in (None, "quantise"):
        bench_quantise(options.tokens, options.sweep)
    if options.only in (None, "products"):
        for name, n, k, margin in STACKS:
            products(f"{name}", options.tokens, n, k)
            products(f"{name} with LoRA", options.tokens, n, k + 3 * margin)
            products(f"dX of {name}", options.tokens, k, n)
            products(f"dX of {name} with LoRA", options.tokens, k, n + 3 * margin)


if __name__ == "__main__":
    main()
