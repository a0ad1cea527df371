"""A small causal transformer that tells an agent's next action from its history; plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from darkroom import NUM_ACTIONS

# Keys and values of the steps so far, of each layer: a pair, or nothing yet.
Cache = list[tuple[Tensor, Tensor] | None]


class HistoryTransformer(nn.Module):
    """One token a step: where the agent stands, what it did last and what that earned; out comes what it does next.

    Args:
        size: cells along a wall.
        max_steps: of a history, over all its episodes.
        width: of the tokens.
        num_layers: of the transformer.
        num_heads: of each layer's attention.
    """

    def __init__(self, size: int, max_steps: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.size = size
        # A cell is its row and its column: what is learned of a goal holds for those that were never one.
        self.row, self.column = nn.Embedding(size, width), nn.Embedding(size, width)
        self.action, self.reward = nn.Embedding(NUM_ACTIONS + 1, width), nn.Embedding(2, width)
        self.step = nn.Embedding(max_steps, width)
        self.layers = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_ACTIONS)
        for embedding in (self.row, self.column, self.action, self.reward, self.step):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(
        self, cells: Tensor, last_actions: Tensor, last_rewards: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Logits of the next action after each step, (rows, steps, actions).

        Args:
            cells, last_actions, last_rewards: (rows, steps) int64, as in ``HistoryRows``.
            cache: of the steps before these; these are added to it.
        """
        done = 0 if cache is None or cache[0] is None else cache[0][0].shape[2]
        steps = torch.arange(done, done + cells.shape[1], device=cells.device)
        x = self.row(cells // self.size) + self.column(cells % self.size) + self.step(steps)
        x = x + self.action(last_actions) + self.reward(last_rewards)
        for number, layer in enumerate(self.layers):
            x, known = layer(x, None if cache is None else cache[number])
            if cache is not None:
                cache[number] = known
        return self.head(self.norm(x))

    def empty_cache(self) -> Cache:
        """A cache in which nothing is known."""
        return [None] * len(self.layers)


class Layer(nn.Module):
    """Causal attention and a wide layer, each added to what came in."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_wide = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``x`` (rows, steps, width) after this layer, and the keys and values of all steps so far.

        With ``known`` steps before it, ``x`` is one step.
        """
        rows, steps, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(rows, steps, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if known is not None:
            key, value = torch.cat([known[0], key], 2), torch.cat([known[1], value], 2)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=known is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, steps, width))
        return x + self.wide(self.norm_wide(x)), (key, value)
