"""Bytes of activations: what a decoder layer keeps for its backward, and what comes and goes. Upper estimates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

# Tokens computed at a time in a layer that does not keep everything: wide enough for full speed.
TILE = 16384
# What transformers' and PEFT's layers keep, beside what fused ones keep (measured: 240 against 92 KiB per token and
# layer for the 8B Llama, 3.2 is assumed).
_STOCK_FACTOR = 3.2
# Tokens whose logits are there at a time.
_HEAD_ROWS = 2048


class Kept(NamedTuple):
    """Bytes that one layer keeps for one token."""

    all: int
    projected: int
    attended: int
    input: int


@dataclass(frozen=True)
class ActivationSizes:
    """What the estimates of one model follow from.

    Attributes:
        hidden: width of the hidden states.
        inner: width of an MLP.
        experts: MLPs that a token goes through in a mixture; 0 without experts.
        heads: of queries.
        queries: width of all queries of a token.
        keys: width of all its keys, and of all its values.
        vocabulary: logits of a token.
        size: bytes of a number.
        is_fused: whether layers are ``FusedDecoderLayer``.
        has_head_norms: whether queries and keys are normalised.
    """

    hidden: int
    inner: int
    experts: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    size: int
    is_fused: bool
    has_head_norms: bool

    @property
    def kept(self) -> Kept:
        """What a layer keeps for a token.

        A fused layer keeps x, q, k, v, the attention's output, the residual after it, gate and up.
        """
        size, hidden = self.size, self.hidden
        inner = self.inner * (self.experts or 1)
        numbers = 2 * hidden + 2 * self.queries + 2 * self.keys + 2 * inner
        if not self.is_fused or self.experts:
            return Kept(int(numbers * size * _STOCK_FACTOR), hidden * size, hidden * size, hidden * size)
        attended = (hidden + self.queries) * size + 4 * self.heads
        # Norms of q and k need what went into them too; LoRA's t is 64 numbers; the sum after the attention.
        norms = 2 if self.has_head_norms else 1
        projected = attended + ((self.queries + 2 * self.keys) * norms + 64 + hidden) * size
        return Kept(numbers * size, projected, attended, hidden * size)

    def cut(self, ranks: int) -> ActivationSizes:
        """Those of one of ``ranks`` that compute each layer together."""
        names = ("inner", "heads", "queries", "keys")
        return replace(self, **{name: getattr(self, name) // ranks for name in names})

    def layer_passing(self, tokens: int) -> int:
        """Bytes that come and go while one layer is computed for ``tokens``."""
        # In the MLP's backward: gate, up, their gradients, the value; around the attention: q, k, v, their gradients.
        mlp = min(tokens, TILE) * 6 * self.inner * self.size
        return mlp + tokens * (2 * self.kept.attended + 8 * self.hidden * self.size)

    def head_passing(self, tokens: int) -> int:
        """Bytes that come and go while the head and the loss are computed for ``tokens``."""
        return _HEAD_ROWS * self.vocabulary * (self.size + 4) + 2 * tokens * self.hidden * self.size


def activation_sizes(
    config: Any, itemsize: int, *, is_fused: bool, has_head_norms: bool = False
) -> ActivationSizes:
    """Those of a model with the configuration ``config`` of transformers, whose numbers have ``itemsize`` bytes."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ActivationSizes(
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        experts=getattr(config, "num_experts_per_tok", None) or 0,
        heads=heads,
        queries=heads * head_dim,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=config.vocab_size,
        size=max(itemsize, 2),
        is_fused=is_fused,
        has_head_norms=has_head_norms,
    )
