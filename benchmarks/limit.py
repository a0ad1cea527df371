"""The measured limit of one LoRA step: the base model's products and its attention alone.

    python -m benchmarks.limit --shape llama8b --seq 2048 --batch 4

Frozen weights have a forward product and dX, no dW. LoRA, elementwise work, recompute, the optimizer and the gaps
between kernels are left out, so no step of this model on this GPU in this precision can be faster. Products run at
their real shapes; the head on blocks of 2,048 tokens, in 16 bit also under FP8. Attention is the fastest backend
that torch has for dense causal rows.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case
from benchmarks.device import timed

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


class Product(NamedTuple):
    """``count`` products of (tokens, K) with (N, K) in one forward."""

    k: int
    n: int
    count: int
    tokens: int


def products_of(config: Any, tokens: int) -> list[Product]:
    """The products of the whole model: projections of all layers, and the head in blocks."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    block = min(2048, tokens)
    return [
        Product(hidden, queries, layers, tokens),
        Product(hidden, keys, 2 * layers, tokens),
        Product(queries, hidden, layers, tokens),
        Product(hidden, inner, 2 * layers, tokens),
        Product(inner, hidden, layers, tokens),
        Product(hidden, config.vocab_size, -(-tokens // block), block),
    ]


def product_ms(product: Product, fp8: bool) -> float:
    """Time of the forward and dX of all its copies, in milliseconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, k, n = product.tokens, product.k, product.n
    x, dy, w = (
        torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
        for shape in ((tokens, k), (tokens, n), (n, k))
    )
    if not fp8:
        return product.count * (timed(lambda: x @ w.T) + timed(lambda: dy @ w))
    e4m3 = torch.float8_e4m3fn
    # Hopper multiplies FP8 only with both operands contiguous along k, so dX reads a transposed copy.
    x8, dy8, w8, wt8 = x.to(e4m3), dy.to(e4m3), w.to(e4m3), w.T.contiguous().to(e4m3)
    rows = torch.ones(tokens, 1, device=device)
    scales, scales_t = torch.ones(1, n, device=device), torch.ones(1, k, device=device)

    def multiply(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return torch._scaled_mm(a, b.T, rows, scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    return product.count * (
        timed(lambda: multiply(x8, w8, scales)) + timed(lambda: multiply(dy8, wt8, scales_t))
    )


def attention_ms(config: Any, batch: int, seq: int) -> tuple[float, str]:
    """Forward and backward of all layers' attention in milliseconds, and the backend that was fastest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q, k, v, dy = (
        torch.randn(batch, count, seq, dim, device=device, dtype=torch.bfloat16)
        for count in (heads, groups, groups, heads)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    best, name = float("inf"), "none"
    for backend in BACKENDS[:2] if device == "cuda" else BACKENDS[2:]:

        def both(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                out = functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, leaves, dy)

        try:
            took = timed(both)
        except RuntimeError:  # this GPU does not have it
            continue
        if took < best:
            best, name = took, backend.name
    return best * config.num_hidden_layers, name


def limit(config: Any, batch: int, seq: int, fp8: bool = False) -> dict[str, Any]:
    """Tokens per second that products and attention alone allow.

    Args:
        config: the model's configuration.
        batch: rows per step.
        seq: tokens per row.
        fp8: the layers' products in FP8 with scales per row.
    """
    tokens = batch * seq
    products = products_of(config, tokens)
    gemm = sum(product_ms(product, fp8) for product in products[:-1]) + product_ms(products[-1], False)
    attention, backend = attention_ms(config, batch, seq)
    ms = gemm + attention
    return {
        "tok_s": tokens / ms * 1e3,
        "ms": ms,
        "gemm_ms": gemm,
        "attention_ms": attention,
        "attention_backend": backend,
    }


def measure(case: Case) -> dict[str, Any]:
    """The limit of a case, in its precision: NF4 is computed in bf16."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(case.model).get_text_config()
    return limit(config, case.batch, case.seq, fp8=case.precision == "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama8b")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    from transformers import LlamaConfig

    from benchmarks.shapes import SHAPES

    config = LlamaConfig(**SHAPES[options.shape])
    for fp8 in (False, True) if torch.cuda.is_available() else (False,):
        figures = limit(config, options.batch, options.seq, fp8)
        print("RESULT " + json.dumps({"precision": "fp8" if fp8 else "bf16", **vars(options), **figures}))


if __name__ == "__main__":
    main()
