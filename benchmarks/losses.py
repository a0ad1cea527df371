"""How fast the losses and their tiles are: figures behind docs/decisions/0002.

    python -m benchmarks.losses                  # the head of an 8B model: 8,192 tokens, 4,096 wide, 128,256 words

Median of 10 runs after 3, in microseconds, with the floor that bytes over the bandwidth of a copy set; then whole
losses from hidden states, forward and backward, with the memory they add.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional

from benchmarks.gemm_layouts import timed
from pantheraml.kernels import accumulate, cross_entropy
from pantheraml.kernels.cross_entropy import gradient_rows, score_rows
from pantheraml.kernels.linear_cross_entropy import linear_log_probs

TILES = [(2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)]


def tiles(rows: int, vocabulary: int) -> None:
    z = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    other = torch.empty_like(z)
    copy = timed(lambda: other.copy_(z), 10, 3)
    print(f"a copy of the logits ({rows} x {vocabulary}): {copy:8.0f}")
    scores = score_rows(z, labels, 1.0, None)
    g = torch.rand(rows, device="cuda")
    for block, warps in TILES:
        cross_entropy._BLOCKS = {"BLOCK": block, "num_warps": warps}
        plain = timed(lambda: score_rows(z, labels, 1.0, None, figures=False), 10, 3)
        with_gradient = timed(lambda: score_rows(other, labels, 1.0, None, gradient=True), 10, 3)
        back = timed(lambda: gradient_rows(other, z, labels, scores[1:3], g, 1.0, None), 10, 3)
        print(
            f"tile {block:6} x {warps:2}: loss {plain:7.0f}  with gradient {with_gradient:7.0f}  backward {back:7.0f}"
        )


def stock(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy((h @ weight.T).float(), labels)


def ours(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -linear_log_probs(h, weight, labels).log_probs.mean()


def given(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy.cross_entropy(h @ weight.T, labels).mean()


def whole(tokens: int, width: int, vocabulary: int) -> None:
    h = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    for trained in (False, True):
        weight = (torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_(
            trained
        )
        leaves = (h, weight) if trained else (h,)
        for function in (stock, given, ours):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            time = timed(
                lambda f=function, w=weight, x=leaves: torch.autograd.grad(f(h, w, labels), x), 10, 3
            )
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            head = "trained" if trained else "frozen "
            print(f"{head} head, {function.__name__:5}: {time:9.0f} us, {peak:6.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    options = parser.parse_args()
    kept = cross_entropy._BLOCKS
    tiles(2048, options.vocabulary)
    cross_entropy._BLOCKS = kept
    inside = accumulate._adds_inside(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    print(f"products add to a float32 total inside: {inside}")
    whole(options.tokens, options.width, options.vocabulary)


if __name__ == "__main__":
    main()
