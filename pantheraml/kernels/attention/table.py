"""The table: which backend computes attention, by what is fastest for the shape and works on the machine.

Measured on an H200, causal, 32/8 heads of 128, forward+backward TFLOP/s: dense 4 x 2,048 / 1 x 8,192:
flash-attn-4 412 / 551, cuDNN 397 / 525, torch's FlashAttention 2 218 / 285; packed 22 documents in 16,384
tokens: flash-attn-4 335, torch 176 (``python -m benchmarks.attention``).
"""

from __future__ import annotations

from pantheraml.kernels.attention.backend import AttentionBackend, AttentionCall, Features
from pantheraml.kernels.attention.cudnn import CuDNN
from pantheraml.kernels.attention.flash_attn_2 import FlashAttn2
from pantheraml.kernels.attention.flash_attn_3 import FlashAttn3
from pantheraml.kernels.attention.flash_attn_4 import FlashAttn4
from pantheraml.kernels.attention.flex import Flex
from pantheraml.kernels.attention.layout import eagerly
from pantheraml.kernels.attention.package import ABSENT
from pantheraml.kernels.attention.plain import Plain
from pantheraml.kernels.attention.torch_efficient import TorchEfficient
from pantheraml.kernels.attention.torch_flash import TorchFlash
from pantheraml.log import say_once

_flash_attn_4, _flash_attn_3, _flash_attn_2 = FlashAttn4(), FlashAttn3(), FlashAttn2()
_cudnn, _torch_flash, _torch_efficient = CuDNN(), TorchFlash(), TorchEfficient()
_flex, _plain = Flex(), Plain()

# The fastest first. Each takes what it can (``why_not``); the last takes everything.
DENSE: tuple[AttentionBackend, ...] = (
    _flash_attn_4,
    _flash_attn_3,
    _cudnn,
    _torch_flash,
    _flash_attn_2,
    _torch_efficient,
    _flex,
    _plain,
)
PACKED: tuple[AttentionBackend, ...] = tuple(backend for backend in DENSE if backend is not _cudnn)

_told: set[tuple[str, Features]] = set()


@eagerly
def choose(call: AttentionCall) -> AttentionBackend:
    """The first backend of the table that takes ``call``; on a GPU the log says which, once per kind."""
    backend, passed = fastest(call)
    _tell(call, backend, passed)
    return backend


def fastest(call: AttentionCall) -> tuple[AttentionBackend, list[tuple[str, str]]]:
    """What ``choose`` says, and the names of the faster ones with why they do not take ``call``; nothing is logged."""
    passed: list[tuple[str, str]] = []
    for backend in PACKED if call.packed else DENSE:
        reason = backend.why_not(call)
        if reason is None:
            return backend, passed
        passed.append((backend.name, reason))
    raise AssertionError("the last backend takes everything")


def _tell(call: AttentionCall, backend: AttentionBackend, passed: list[tuple[str, str]]) -> None:
    key = backend.name, call.features
    if call.device.type != "cpu" and key not in _told:
        _told.add(key)
        say_once(explain(call, backend, passed))


def explain(call: AttentionCall, backend: AttentionBackend, passed: list[tuple[str, str]]) -> str:
    """One sentence on what attends, and one on what would be faster and why it does not.

    Packages nobody asked for and nobody misses go without mention.
    """
    kind = "packed" if call.packed else "dense"
    features = {"window": call.window, "soft-cap": call.softcap, "sinks": call.sinks or None}
    extra = "".join(f", {name}" for name, value in features.items() if value is not None)
    dtype = str(call.dtype).removeprefix("torch.")
    said = (
        f"Attention of {kind} rows ({dtype}, {call.heads}/{call.kv_heads} heads of {call.head_dim}{extra}): "
    )
    said += f"{backend.name}."
    passed = [(name, reason) for name, reason in passed if reason != ABSENT]
    if passed:
        said += " Passed over: " + "; ".join(f"{name}: {reason}" for name, reason in passed) + "."
    return said
