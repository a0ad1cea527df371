"""Dropout on a GPU: the kernel beside plain PyTorch, adapters in layers beside stock ones, and a model's own."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels.attention_dropout import HeadDropout, dropped_probabilities, dropping_attention
from pantheraml.kernels.keyed_dropout import add_dropped, dropped, kept_values
from pantheraml.models.patching import PatchSet
from pantheraml.models.sample_dropout import follow_samples, keyed
from tests.fused.masks import Recorder, apply_masks
from tests.fused.test_decoder_layer import ALL, build, run
from tests.fused.test_dropout import DROP, in_4bit
from tests.fused.test_fp8_layer import error, in_fp8
from tests.fused.test_whole_layer import build_whole
from tests.gpu.test_formats import needs_fp8
from tests.kernels.dropout_cases import SEED, SHAPES, SHARES, expected, make
from tests.models.dropping import build as build_dropping

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")]

SEEDS = range(4)


@pytest.mark.parametrize("first_row", [0, 5, 2**33 + 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 4096), (70, 14336)])
def test_the_kernel_equals_plain_pytorch_bit_by_bit(shape, p, dtype, first_row):
    x, total, whole = make(shape, dtype, "cuda")
    keys = torch.arange(first_row, first_row + shape[0])
    kept = kept_values(keys, shape[1], p, SEED).cuda()
    assert torch.equal(dropped(x, p, SEED, first_row), expected(x, kept, p))
    assert torch.equal(dropped(x, p, SEED, keys=keys.cuda()), expected(x, kept, p))
    want, beside = expected(x, kept, p, total), whole[:, shape[1] :].clone()
    assert torch.equal(add_dropped(total, x, p, SEED, first_row), want)
    assert torch.equal(whole[:, shape[1] :], beside)


@pytest.mark.parametrize("first", [7, 2048, 7168])
def test_a_part_of_the_columns(first):
    x, _, _ = make((130, 2500), torch.bfloat16, "cuda")
    kept = kept_values(torch.arange(130), first + 2500, 0.3, SEED)[:, first:].cuda()
    assert torch.equal(dropped(x, 0.3, SEED, first_column=first), expected(x, kept, 0.3))


def test_more_than_2_to_the_31_values():
    rows, cols = 2**17 + 3, 2**14 + 8
    x = torch.ones(rows, cols, dtype=torch.bfloat16, device="cuda")
    out = dropped(x, 0.5, SEED, out=x)
    for first in (0, rows - 5):
        kept = kept_values(torch.arange(first, first + 5), cols, 0.5, SEED).cuda()
        assert torch.equal(out[first : first + 5] != 0, kept)
    assert abs(float((out != 0).float().mean()) - 0.5) < 5 * 0.5 / out.numel() ** 0.5 + 1e-7


def test_the_operator():
    x, total, _ = make((33, 300), torch.bfloat16, "cuda")
    arguments = (total.clone(), x.clone(), 0.25, SEED, (3, 0), None, True)
    torch.library.opcheck(torch.ops.pantheraml.keyed_dropout, arguments)
    torch.ops.pantheraml.keyed_dropout(*arguments)
    assert torch.equal(arguments[0], add_dropped(total, x, 0.25, SEED, 3))


def squared_errors(found, exact):
    """Per tensor, the sum over batches of its squared error, and of its squared size."""
    sums = {}
    for (logits, gradients), (logits_64, gradients_64) in zip(found, exact, strict=True):
        for name, truth in {"logits": logits_64, **gradients_64}.items():
            value = logits if name == "logits" else gradients[name]
            error, size = sums.get(name, (0.0, 0.0))
            error += float((value.double() - truth).square().sum())
            sums[name] = (error, size + float(truth.square().sum()))
    return sums


def copied(found):
    return found[0], {name: gradient.clone() for name, gradient in found[1].items()}


@pytest.mark.parametrize("lora", [DROP, {"lora_bias": True}, {"lora_bias": True, **DROP}])
@pytest.mark.parametrize("keep", ["all", "attended"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_errors_are_at_most_twice_those_of_stock(family, packed, keep, lora, monkeypatch):
    """In bf16 and NF4, against float64 with the same masks."""
    recorder = Recorder(monkeypatch)
    prepare = in_4bit if packed else (lambda model: model)
    model, layers = build_whole(family, keep, **lora)
    model = prepare(model.to(torch.bfloat16))
    for layer in layers:
        layer.tile = 20
    ours, stock, exact = [], [], []
    for seed in SEEDS:
        ours.append(copied(run(model, seed=seed)))
        masks = recorder.masks(model)
        assert bool(masks) == ("lora_dropout" in lora)
        for found, dtype in ((stock, torch.bfloat16), (exact, torch.float64)):
            other = prepare(build(family, ALL, False, **lora)[0].train().to(torch.bfloat16))
            other = unpacked(other).to(dtype) if dtype == torch.float64 else other
            found.append(copied(run(apply_masks(other, masks) if masks else other, seed=seed)))
    assert recorder.layers == 2 * len(SEEDS)
    mine, theirs = squared_errors(ours, exact), squared_errors(stock, exact)
    for name, (squares, size) in mine.items():
        if "k_proj.lora_B.default.bias" not in name:  # a sum that nearly cancels
            assert squares <= 4 * theirs[name][0], name
            assert squares < 0.3**2 * size, name


def unpacked(model):
    """``model`` with plain linears in the place of its 4-bit ones."""
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        new = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        new.weight = torch.nn.Parameter(weight, requires_grad=False)
        new.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    return model


@needs_fp8
@pytest.mark.parametrize("lora", [DROP, {"lora_bias": True}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fp8_layers_err_as_stock_ones(family, lora, monkeypatch):
    recorder, squares = Recorder(monkeypatch), []
    for seed in SEEDS:
        model, _ = build_whole(family, "attended", **lora)
        ours = copied(run(in_fp8(model.to(torch.bfloat16)), seed=seed))
        masks = recorder.masks(model)
        exact, stock = (build(family, ALL, False, **lora)[0].train() for _ in range(2))
        exact, stock = exact.double(), in_fp8(stock.to(torch.bfloat16))
        if masks:
            exact, stock = apply_masks(exact, masks), apply_masks(stock, masks)
        exact, stock = run(exact, seed=seed), run(stock, seed=seed)
        squares.append([error(found[0].double(), exact[0]) ** 2 for found in (ours, stock)])
    assert recorder.layers == 2 * len(SEEDS)
    mine, theirs = torch.tensor(squares).mean(0).sqrt().tolist()
    assert mine <= 1.4 * theirs < 0.25


def head_dropout(device, rows=3, tokens=300, heads=4):
    """Samples behind padding and behind one another, one of them cut off from what was before it."""
    keys = (torch.arange(5, 5 + rows)[:, None] << 32) | torch.arange(tokens)
    keys[0, :7] = keys[0, 0]
    keys[0, 7:] -= 7
    keys[1, 100:] = (77 << 32) | torch.arange(900, 900 + tokens - 100)
    return HeadDropout(0.1, tuple(SEED + 2 * head for head in range(heads)), keys.to(device))


def test_masks_of_attention_are_those_of_the_cpu():
    for mine, theirs in zip(head_dropout("cuda").parts(), head_dropout("cpu").parts(), strict=True):
        assert mine[:2] == theirs[:2]
        assert torch.equal(mine[2].cpu(), theirs[2])


@pytest.mark.parametrize(
    ("grouped", "tokens", "width", "seen"),
    [
        (1, 300, 64, "causal"),
        (2, 300, 64, "causal"),
        (2, 517, 128, "bool"),
        (1, 300, 80, "added"),
        (1, 130, 256, "all"),
    ],
)
def test_attention_with_dropout_errs_as_the_formula_in_16_bits(grouped, tokens, width, seen):
    """Values and gradients in bf16, beside the eager formula in bf16, against float64 on the CPU."""
    shape, results = (3, 4, tokens, width), {}
    generator = torch.Generator().manual_seed(0)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if seen == "bool":
        hidden = hidden | (torch.rand(3, 1, tokens, tokens, generator=generator) < 0.2).tril(-1)
    bias = torch.zeros(tokens, tokens).masked_fill(hidden, -3.0)
    given = [
        torch.randn(3, 4 // (grouped if part else 1), *shape[2:], generator=generator) for part in range(3)
    ]
    weight = torch.randn(shape, generator=generator)

    def how(x):
        biases = {"bool": dict(bias=~hidden.to(x.device)), "added": dict(bias=bias.to(x))}
        return biases.get(seen, dict(causal=seen == "causal"))

    def eager(q, k, v, drop, **_):
        k, v = (one.repeat_interleave(grouped, dim=1) for one in (k, v))
        scores = q @ k.transpose(-1, -2) * width**-0.5
        scores = scores + bias.to(q) if seen == "added" else scores
        if seen in ("causal", "bool"):
            scores = scores.masked_fill(hidden.to(q.device), torch.finfo(q.dtype).min)
        probabilities = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return dropped_probabilities(probabilities, drop) @ v

    for name, device, dtype, attend in (
        ("exact", "cpu", torch.float64, dropping_attention),
        ("mine", "cuda", torch.bfloat16, dropping_attention),
        ("theirs", "cuda", torch.bfloat16, eager),
    ):
        rounded = [one.bfloat16().to(device, dtype).requires_grad_() for one in given]
        out = attend(*rounded, head_dropout(device, tokens=tokens), **how(rounded[0]))
        gradients = torch.autograd.grad((out * weight.to(device, dtype)).sum(), rounded)
        results[name] = [one.detach().cpu().double() for one in (out, *gradients)]
    for exact, mine, theirs in zip(*results.values(), strict=True):
        assert (mine - exact).norm() <= 1.5 * (theirs - exact).norm()
        assert (mine - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "phi3"])
def test_models_drop_on_a_gpu_what_they_drop_on_a_cpu(kind, recompute):
    """With recompute, too, which runs in the thread that autograd has for the GPU."""
    ids = torch.randint(5, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    keys, results = (torch.arange(3)[:, None] << 32) | torch.arange(40), []
    for device in ("cpu", "cuda"):
        model = build_dropping(kind).to(device)
        if recompute and device == "cuda":
            prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            enable = getattr(model, f"{prefix}_checkpointing_enable")
            enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
        followed = follow_samples(model, PatchSet())
        with keyed(followed.keys(keys.to(device), 5)):
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            (logits.log_softmax(-1) * torch.linspace(-1, 1, 512, device=device)).sum().backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        results.append([logits.detach().cpu(), *gradients])
    for theirs, mine in zip(*results, strict=True):
        # Biases of keys have gradients that cancel.
        assert (mine - theirs).norm() <= 2e-3 * theirs.norm() + 1e-5 * results[0][0].norm()


@pytest.mark.parametrize("keep", ["all", "attended", "input"])
def test_fused_layers_drop_of_attention_what_stock_ones_do(keep):
    """In bf16, with adapters that drop, too, kept or computed again."""
    keys = (torch.tensor([7, 3])[:, None] << 32) | torch.arange(24)
    results = []
    for fused in (True, False):
        model = build("llama", ALL, fused, **DROP)[0].train().to("cuda", torch.bfloat16)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
            if hasattr(module, "keep_when_recomputing"):
                module.gradient_checkpointing, module.keep_when_recomputing = keep != "all", keep
        with keyed(follow_samples(model, PatchSet()).keys(keys.cuda(), 5)):
            logits, gradients = run(model)
        results.append([logits.float(), *(gradients[name].float() for name in sorted(gradients))])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() <= 0.2 * theirs.norm()  # with other masks as large as the values
