"""What "a 7B model" means for a plan: the shape of the usual model of about that size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from pantheraml.errors import ConfigError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([MB])\s*", re.IGNORECASE)
_UNITS = {"M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class UsualModel:
    """The widths of a dense decoder with gated MLPs, as a configuration of transformers names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False

    @property
    def of_layer(self) -> int:
        """Numbers of a layer."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads)
        attention = heads * self.hidden_size * self.hidden_size // self.num_attention_heads
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def of_ends(self) -> int:
        """Numbers of embedding, last norm and head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size

    @property
    def numbers(self) -> int:
        """All of them."""
        return self.num_hidden_layers * self.of_layer + self.of_ends


# Widths as Meta, Alibaba and Mistral publish them, from the smallest on.
_SHAPES = (
    UsualModel(576, 1536, 30, 9, 3, 49152, True),  # SmolLM2 135M
    UsualModel(896, 4864, 24, 14, 2, 151936, True),  # Qwen2.5 0.5B
    UsualModel(2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    UsualModel(1536, 8960, 28, 12, 2, 151936, True),  # Qwen2.5 1.5B
    UsualModel(3072, 8192, 28, 24, 8, 128256, True),  # Llama 3.2 3B
    UsualModel(4096, 14336, 32, 32, 8, 32768),  # Mistral 7B
    UsualModel(4096, 14336, 32, 32, 8, 128256),  # Llama 3.1 8B
    UsualModel(5120, 13824, 48, 40, 8, 152064),  # Qwen2.5 14B
    UsualModel(5120, 27648, 64, 40, 8, 152064),  # Qwen2.5 32B
    UsualModel(8192, 28672, 80, 64, 8, 128256),  # Llama 3.1 70B
    UsualModel(16384, 53248, 126, 128, 8, 128256),  # Llama 3.1 405B
)


def read_size(text: object) -> int | None:
    """Numbers of a model that ``7B``, ``1.5b`` or ``350M`` means; None for what is no size."""
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    return None if found is None else int(float(found[1]) * _UNITS[found[2].upper()])


def usual_model(numbers: int) -> UsualModel:
    """The published shape that is nearest to ``numbers``, with as many layers as come nearest to it.

    Raises:
        ConfigError: fewer than 50 million or more than 1,000 billion.
    """
    if not 50 * 10**6 <= numbers <= 10**12:
        raise ConfigError(
            got=f"A model of {numbers:,} numbers was asked for.",
            need="Plans by size are for models of 50M to 1000B.",
            fix="Name the model, or a folder with its config.json, instead.",
        )
    near = min(_SHAPES, key=lambda shape: abs(math.log(shape.numbers / numbers)))
    layers = max(1, round((numbers - near.of_ends) / near.of_layer))
    return replace(near, num_hidden_layers=layers)
