"""Mixtures of experts: a training step of their blocks, stock against fused, and the grouped products alone.

    python -m benchmarks.moe_step                      # qwen3_moe (4 layers) and mixtral (2), 8,192 tokens, bf16, r=16
    python -m benchmarks.moe_step --backends           # the fused step with each choice of grouped_gemm.BACKENDS
    python -m benchmarks.moe_step --sweep              # tiles of our grouped product
    python -m benchmarks.moe_step --profile            # kernels of one fused step

A step is forward and backward of a stack of ``x + block(x)`` with LoRA on the experts, router included, attention
not. Stock is transformers with PEFT, whichever experts implementation transformers chose. Random weights, so that
experts get about equal shares. Medians; products in TFLOP/s.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from benchmarks.gemm_layouts import randn, timed
from pantheraml.kernels import expert_activation, expert_groups, expert_routing, grouped_gemm, grouped_outer
from pantheraml.kernels.expert_groups import Groups
from pantheraml.models.families import find_family
from pantheraml.models.fused import apply_experts
from pantheraml.models.patching import PatchSet

SHAPES = {
    "qwen3_moe": dict(
        hidden_size=2048,
        moe_intermediate_size=768,
        intermediate_size=6144,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=4,
    ),
    "mixtral": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
    ),
    "gpt_oss": dict(
        hidden_size=2880,
        intermediate_size=2880,
        num_local_experts=32,
        num_experts_per_tok=4,
        num_hidden_layers=4,
    ),
}
# Rows of a tile, BLOCK_N, BLOCK_K, warps, stages, tiles side by side.
SWEPT = [
    (128, 256, 64, 8, 3, 8),
    (128, 256, 64, 8, 4, 8),
    (128, 256, 64, 8, 4, 4),
    (128, 256, 64, 8, 4, 16),
    (128, 128, 64, 8, 4, 8),
    (128, 128, 64, 4, 4, 8),
    (128, 128, 128, 8, 3, 8),
    (64, 256, 64, 4, 4, 8),
    (64, 256, 64, 8, 4, 8),
    (64, 128, 64, 4, 5, 8),
]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build(family: str, rank: int):
    """A bf16 model of ``family`` with a small vocabulary and LoRA on its experts."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    common = dict(vocab_size=512, num_attention_heads=32, num_key_value_heads=8, head_dim=64)
    config = AutoConfig.for_model(family, **common, **SHAPES[family])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if not rank:
        return model
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=EXPERTS)
    model = get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def measure_step(model, tokens: int, runs: int) -> tuple[float, float]:
    """Milliseconds of a step, and GiB that it needs beside the weights."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    blocks = [layer.mlp for layer in base.model.layers]
    x = randn(4, tokens // 4, base.config.hidden_size) * 50

    def step():
        hidden = x.requires_grad_()
        for block in blocks:
            out = block(hidden)
            hidden = hidden + (out[0] if isinstance(out, tuple) else out)
        hidden.sum().backward()
        model.zero_grad(set_to_none=True)
        x.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return timed(step, runs=runs, warm=3) / 1e3, peak


def compare(family: str, tokens: int, rank: int, runs: int, *, profile: bool) -> None:
    """One line: the step as transformers and PEFT compute it, and fused."""
    model = build(family, rank)
    results = []
    for fused in (False, True):
        if fused:
            apply_experts(model, find_family(model.config), PatchSet())
        try:
            results.append(measure_step(model, tokens, runs))
        except torch.cuda.OutOfMemoryError:
            results.append((float("nan"), float("nan")))
    (stock, before), (ours, after) = results
    print(
        f"{family} step: stock {stock:.2f} ms, {before:.2f} GiB; fused {ours:.2f} ms, {after:.2f} GiB; "
        f"{stock / ours:.2f} times as fast",
        flush=True,
    )
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            measure_step(model, tokens, 1)
        print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


def backends(family: str, tokens: int, rank: int, runs: int) -> None:
    """The fused step with each choice of grouped_gemm.BACKENDS."""
    before = dict(grouped_gemm.BACKENDS)
    model = build(family, rank)
    apply_experts(model, find_family(model.config), PatchSet())
    for plain, added in itertools.product(("triton", "torch"), repeat=2):
        grouped_gemm.BACKENDS.update({"plain": plain, "added": added, "added to many": added})
        ms, _ = measure_step(model, tokens, runs)
        print(f"{family:10} plain={plain:6} added={added:6} {ms:8.2f} ms", flush=True)
    grouped_gemm.BACKENDS.update(before)


def sizes(family: str) -> tuple[int, int, int, int]:
    """Experts, choices of a token, hidden and inner width."""
    shape = SHAPES[family]
    experts = shape.get("num_experts") or shape["num_local_experts"]
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"])
    return experts, shape["num_experts_per_tok"], shape["hidden_size"], inner


def rates(source, w, groups, index, rank: int) -> list[float]:
    """TFLOP/s of one product: ours, torch's, ours with LoRA (and gathering), torch's with LoRA."""
    rows, (experts, cols, depth) = groups.num_rows, w.shape
    low_rank = grouped_gemm.GroupedLowRank(randn(rows, rank), randn(experts, cols, rank))
    in_order = source if index is None else source.index_select(0, index)
    kernels = (grouped_gemm.triton_rows, grouped_gemm.torch_rows)
    plain = [timed(lambda f=f: f(in_order, w, groups), 10, 3) for f in kernels]
    added = [timed(lambda f=f: f(source, w, groups, index, None, low_rank), 10, 3) for f in kernels]
    return [2e-6 * rows * cols * depth / us for us in (*plain, *added)]


def products(family: str, tokens: int, rank: int) -> None:
    """TFLOP/s of each product of a layer, ours and torch's, plain and with what LoRA adds; microseconds of the rest."""
    experts, choices, width, inner = sizes(family)
    index = torch.rand(tokens, experts, device="cuda").topk(choices).indices
    routes = expert_routing.sort_by_expert(index, experts)
    groups, rows, gate = routes.groups, routes.groups.num_rows, expert_activation.Gate()
    w1, w2 = randn(experts, 2 * inner, width), randn(experts, width, inner)
    wide, narrow, tall, x = (
        randn(rows, 2 * inner),
        randn(rows, inner),
        randn(rows, width),
        randn(tokens, width),
    )
    print(f"{'product':26} {'ours':>7} {'torch':>7} {'ours+LoRA':>10} {'torch+LoRA':>11}   TFLOP/s")
    for name, source, w, gathered in (
        ("gate_up", x, w1, routes.tokens),
        ("down", narrow, w2, None),
        ("dX of down", x, w2.mT, routes.tokens),
        ("dX of gate_up", wide, w1.mT, None),
    ):
        four = rates(source, w, groups, gathered, rank)
        print(
            f"{family + ' ' + name:26} {four[0]:7.0f} {four[1]:7.0f} {four[2]:10.0f} {four[3]:11.0f}",
            flush=True,
        )
    a, b, t = randn(experts, rank, width), randn(experts, rank, 2 * inner), randn(rows, rank)
    da, db, w = randn(experts, rank, width), randn(experts, 2 * inner, rank), randn(rows).abs()
    rest = {
        "sort": lambda: expert_routing.sort_by_expert(index, experts),
        "tiles": lambda: Groups(groups.ends, rows).tiles(128),
        "x A^T": lambda: grouped_gemm.triton_rows(x, a, groups, routes.tokens),
        "dgu B": lambda: grouped_gemm.triton_rows(wide, b, groups),
        "dA": lambda: grouped_outer.outer_into(t, x, groups, da, right_rows=routes.tokens),
        "dB": lambda: grouped_outer.outer_into(wide, t, groups, db),
        "activation": lambda: expert_activation.activate(wide, gate),
        "its gradient": lambda: expert_activation.activate_back(narrow, wide, w, gate, with_value=True),
        "sum": lambda: expert_routing.sum_choices(tall, routes.place, None),
    }
    print(
        "   us: " + ", ".join(f"{name} {timed(call, 10, 3):.0f}" for name, call in rest.items()), flush=True
    )


def sweep(family: str, tokens: int) -> None:
    """Tiles of our product on gate_up and its dX: rows, BLOCK_N, BLOCK_K, warps, stages, tiles side by side."""
    experts, choices, width, inner = sizes(family)
    index = torch.rand(tokens, experts, device="cuda").topk(choices).indices
    ends, rows = expert_routing.sort_by_expert(index, experts).groups.ends, tokens * choices
    w, x, dy = randn(experts, 2 * inner, width), randn(rows, width), randn(rows, 2 * inner)
    flops = 4e-6 * rows * inner * width
    before = dict(grouped_gemm.TILES), grouped_gemm._GROUP, expert_groups.LARGEST_BLOCK
    for block, *tile, group in SWEPT:
        expert_groups.LARGEST_BLOCK = block
        grouped_gemm.TILES[block], grouped_gemm._GROUP = tuple(tile), group
        groups = Groups(ends, rows)
        label = f"{family:10} {groups.block} x {tile}, side by side {group}"
        try:
            forward = flops / timed(lambda g=groups: grouped_gemm.triton_rows(x, w, g), 10, 3)
            back = flops / timed(lambda g=groups: grouped_gemm.triton_rows(dy, w.mT, g), 10, 3)
        except Exception as error:  # a tile that does not fit
            print(f"{label}: {type(error).__name__}")
            continue
        print(f"{label}: {forward:.0f}, dX {back:.0f} TFLOP/s", flush=True)
    tiles, grouped_gemm._GROUP, expert_groups.LARGEST_BLOCK = before
    grouped_gemm.TILES.update(tiles)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=["qwen3_moe", "mixtral"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16, help="0 trains all weights")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--backends", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.tokens} tokens, r={options.rank}"
    )
    print(f"torch's grouped product: {grouped_gemm.why_no_torch_grouped(device) or 'runs'}")
    for family in options.families:
        if options.sweep:
            sweep(family, options.tokens)
        elif options.backends:
            backends(family, options.tokens, options.rank, options.runs)
        else:
            if options.rank and not options.profile:
                products(family, options.tokens, options.rank)
            compare(family, options.tokens, options.rank, options.runs, profile=options.profile)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
