"""FlashAttention 4 (the package ``flash-attn-4``, extra ``hopper``): kernels in Python that compile themselves.

Half precision, dense and packed rows, grouped heads, windows, soft-caps; Hopper and newer. The first call
of a kind compiles for some seconds; lengths are not compiled in. Tri Dao and others, BSD.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.attention.backend import HALF, AttentionCall, Kept
from pantheraml.kernels.attention.probe import failure


@lru_cache(maxsize=1)
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]] | str:
    """The package's forward and backward without autograd, or why there are none."""
    try:
        interface = import_module("flash_attn.cute.interface")
        return interface._flash_attn_fwd, interface._flash_attn_bwd
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flash_attn"):
            return "not installed (pip install 'pantheraml[hopper]')"
        return f"not usable: {error}"
    except Exception as error:  # a compiler package that does not fit raises whatever it likes
        return f"not usable: {type(error).__name__}: {str(error).strip()[:160]}"


class FlashAttn4:
    """``flash_attn.cute`` without its autograd Functions."""

    name = "flash-attn-4"

    def why_not(self, call: AttentionCall) -> str | None:
        """Needs the package, Hopper or newer, half precision and heads of 8, 16, ... 256 numbers."""
        if call.device.type != "cuda":
            return "needs a GPU"
        if call.dtype not in HALF:
            return f"computes in bfloat16 or float16, not in {call.dtype}"
        if call.head_dim > 256 or call.head_dim % 8:
            return f"takes heads of 8, 16, ... 256 numbers, not {call.head_dim}"
        if torch.cuda.get_device_capability(call.device) < (9, 0):
            return "has a backward for Hopper and newer only"
        found = _functions()
        return found if isinstance(found, str) else failure(self, call.features)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Kept]:
        """See ``AttentionBackend``."""
        found = _functions()
        assert not isinstance(found, str), found
        heads = (t.detach() for t in call.tokens_of(q, k, v))
        with torch.cuda.device(q.device):
            out, lse, *_ = found[0](*heads, return_lse=True, **_options(call))
        return call.rows_of(out)[0], (lse,)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``AttentionBackend``."""
        found = _functions()
        assert not isinstance(found, str), found
        dout, q, k, v, out = (t.detach() for t in call.tokens_of(dout, q, k, v, out))
        with torch.cuda.device(q.device):
            dq, dk, dv, *_ = found[1](q, k, v, out, dout, kept[0], **_options(call))
        return tuple(call.rows_of(dq, dk, dv))  # pyright: ignore[reportReturnType]


def _options(call: AttentionCall) -> dict[str, Any]:
    """Keyword arguments that the forward and the backward share."""
    options: dict[str, Any] = {
        "softmax_scale": call.scale,
        "causal": call.window is None,
        "softcap": call.softcap or 0.0,
        "window_size_left": None if call.window is None else call.window - 1,
        "window_size_right": None if call.window is None else 0,
    }
    if call.packed:
        offsets, longest = call.offsets
        options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return options
