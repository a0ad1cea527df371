"""Attention backends are tried while weights are loaded.

The first call of a kind loads libraries, builds kernels and compares what they compute (``attention/probe.py``): some
seconds on the host, most of them outside of Python. Reading a checkpoint takes about as long, and leaves cores idle.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pantheraml.kernels.attention.backend import AttentionCall
from pantheraml.kernels.attention.layout import Layout
from pantheraml.kernels.attention.table import fastest
from pantheraml.models.families import ModelFamily


def coming_calls(
    config: Any, family: ModelFamily, dtype: torch.dtype, device: torch.device, tokens: int
) -> list[AttentionCall]:
    """Calls of the kinds that training on rows of up to ``tokens`` makes; none where the configuration does not say.

    Args:
        config: the text part's.
        family: its architecture.
        dtype: in which attention is computed.
        device: where.
        tokens: of the longest row.
    """
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or tokens < 3:
        return []
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    softcap = config.attn_logit_softcapping if "attention_softcap" in family.deviations else None
    sinks = "attention_sinks" in family.deviations
    window = getattr(config, "sliding_window", None) if "sliding_window" in family.deviations else None
    offsets = torch.tensor([0, 1, tokens], dtype=torch.int32)
    layouts = None, Layout((1, tokens), device, offsets, tokens - 1)
    calls = [
        AttentionCall(
            1,
            tokens,
            heads,
            kv_heads,
            head_dim,
            dtype,
            device,
            layout,
            window=reach,
            softcap=softcap,
            sinks=sinks,
        ).reduced()
        for layout in layouts
        for reach in (None, window)
    ]
    return list({call.features: call for call in calls}.values())


@contextmanager
def tried_beside(calls: Sequence[AttentionCall]) -> Iterator[None]:
    """Look for the fastest backend of each call, from a thread, while the block runs."""
    if not calls or calls[0].device.type != "cuda":
        yield
        return
    thread = threading.Thread(target=_try, args=(calls,), name="pantheraml-attention", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _try(calls: Sequence[AttentionCall]) -> None:
    for call in calls:
        with torch.cuda.device(call.device):
            fastest(call)
