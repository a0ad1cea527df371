"""A model of which no more is known than how many numbers it has: a shape of Llama's kind of that size."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pantheraml.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Billions of numbers -> hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, vocab_size.
_SHAPES = {
    0.6: (1024, 3072, 16, 8, 151936),
    1.2: (2048, 8192, 32, 8, 128256),
    3.2: (3072, 8192, 24, 8, 128256),
    8.0: (4096, 14336, 32, 8, 128256),
    14.8: (5120, 17408, 40, 8, 151936),
    32.8: (5120, 25600, 64, 8, 151936),
    70.6: (8192, 28672, 64, 8, 128256),
    405.0: (16384, 53248, 128, 8, 128256),
}
_HEAD_DIM = 128
# Up to here the head is the embedding.
_TIED = 4.0
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([MBT])\s*", re.IGNORECASE)
_BILLIONS = {"M": 1e-3, "B": 1.0, "T": 1e3}


def config_of_size(size: str) -> PretrainedConfig:
    """The configuration of a dense model of ``size`` numbers: the widths of the usual one of about that size, and as
    many layers as make it up.

    Args:
        size: such as ``"7B"`` or ``"500M"``.

    Raises:
        ConfigError: no size.
    """
    found = _SIZE.fullmatch(size)
    billions = float(found[1]) * _BILLIONS[found[2].upper()] if found is not None else 0.0
    if billions <= 0:
        raise ConfigError(
            got=f"model_size={size!r} was given.",
            need="It is how many numbers a model has, in millions or billions.",
            fix='Write model_size="7B", or give the model itself.',
        )
    from transformers import LlamaConfig

    nearest = min(_SHAPES, key=lambda one: abs(math.log(one / billions)))
    hidden, inner, heads, kv_heads, vocabulary = _SHAPES[nearest]
    layer = hidden * _HEAD_DIM * 2 * (heads + kv_heads) + 3 * hidden * inner
    ends = vocabulary * hidden * (1 if billions < _TIED else 2)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_HEAD_DIM,
        vocab_size=vocabulary,
        num_hidden_layers=max(1, round((billions * 1e9 - ends) / layer)),
        tie_word_embeddings=billions < _TIED,
    )
