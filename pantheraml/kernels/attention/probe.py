"""Whether a backend really works here: it is run once on small tensors, forward and backward.

Versions say little: a kernel may be missing from a build, refuse a head size, or ignore a window. So each
kind of call (``Features``) is tried on the device against the formula in float64, and what raised or was
wrong is not used. Costs a few milliseconds, and the compilation of kernels that compile themselves.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import AttentionBackend, AttentionCall, Features
from pantheraml.kernels.attention.layout import Layout
from pantheraml.kernels.attention.plain import Plain
from pantheraml.kernels.attention.sinks import add_sinks

# More than one tile of every kernel, and no multiple of one; documents of one token and across tiles.
PROBED_TOKENS = 293
DOCUMENTS = (0, 70, 71, 204, PROBED_TOKENS)
WINDOW = 37
SOFTCAP = 2.0
# How the reason of a backend begins that was run, and raised or was wrong.
TRIED = "tried on"
TOLERANCE = 0.03  # of the largest number, in half precision
TOLERANCE_FLOAT32 = 1e-3


@lru_cache(maxsize=256)
def failure(backend: AttentionBackend, features: Features) -> str | None:
    """Why ``backend`` is not to be used for calls of this kind, or None when it computed what is right."""
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # what a compiler says of its own parts, to programs for which that is fatal
            wrong = _differences(backend, features)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{TRIED} {features.device}, it raised {type(error).__name__}: {lines[0][:160]}"
    if wrong:
        return f"{TRIED} {features.device}, its {' and '.join(wrong)} were wrong"
    return None


def _differences(backend: AttentionBackend, features: Features) -> list[str]:
    """Names of the results that differ from the formula by more than half precision explains."""
    call, tensors = _example(features)
    sinks = torch.linspace(-1.0, 2.0, call.heads, device=features.device) if features.sinks else None
    ours = _results(backend, call, tensors, sinks)
    wide = replace(call, dtype=torch.float64)
    right = _results(Plain(), wide, [t.double() for t in tensors], sinks)
    tolerance = TOLERANCE_FLOAT32 if features.dtype == torch.float32 else TOLERANCE
    names = ("output", "dq", "dk", "dv")
    return [n for n, a, b in zip(names, ours, right, strict=True) if not _is_close(a, b, tolerance)]


def _example(features: Features) -> tuple[AttentionCall, list[Tensor]]:
    """A call of this kind with two key heads, and its q, k, v and dout."""
    generator = torch.Generator().manual_seed(0)
    heads, dim = 2 * features.groups, features.head_dim
    shapes = [(1, PROBED_TOKENS, h, dim) for h in (heads, 2, 2, heads)]
    tensors = [torch.randn(s, generator=generator).to(features.device, features.dtype) for s in shapes]
    layout = None
    if features.packed:
        offsets = torch.tensor(DOCUMENTS, dtype=torch.int32, device=features.device)
        longest = int(offsets.diff().max())
        layout = Layout((1, PROBED_TOKENS), features.device, offsets, longest)
    call = AttentionCall.of(
        tensors[0],
        tensors[1],
        layout,
        2.0 * dim**-0.5,  # logits of about 2: neither flat nor one-hot
        WINDOW if features.window else None,
        SOFTCAP if features.softcap else None,
        features.sinks,
    )
    return call, tensors


def _results(
    backend: AttentionBackend, call: AttentionCall, tensors: list[Tensor], sinks: Tensor | None
) -> list[Tensor]:
    q, k, v, dout = tensors
    out, kept = backend.forward(q, k, v, call)
    if sinks is not None:
        add_sinks(out, kept[0], sinks, call)
    return [out, *backend.backward(dout, q, k, v, out, kept, call)]


def _is_close(ours: Tensor, right: Tensor, tolerance: float) -> bool:
    if ours.shape != right.shape:
        return False
    error = (ours.double() - right).abs().max()
    return bool(torch.isfinite(error)) and bool(error <= tolerance * right.abs().max())
