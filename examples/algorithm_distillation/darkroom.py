"""The dark room: a square of cells, one of which is the goal, and nobody sees which.

An agent starts each episode in the middle and sees where it stands, nothing else. It earns 1 for every step that ends
in the goal's cell. What the goal is can only be learned by earning something, in one episode, and used in the next.
The task is that of Laskin et al., In-context Reinforcement Learning with Algorithm Distillation (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Stay, down, up, right, left.
MOVES = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
NUM_ACTIONS = len(MOVES)


class Darkroom:
    """Many rooms at once, one for each goal; all on the device of ``goals``.

    Args:
        goals: (rooms,) int64, the goal's cell in each room: row x size + column.
        size: cells along a wall.
    """

    def __init__(self, goals: Tensor, size: int) -> None:
        self.goals, self.size = goals, size
        self._moves = MOVES.to(goals.device)
        self.reset()

    def reset(self) -> Tensor:
        """Put every agent into the middle; returns the cells, (rooms,) int64."""
        self._places = torch.full((len(self.goals), 2), self.size // 2, device=self.goals.device)
        return self.cells

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Move every agent; a wall stops it.

        Args:
            actions: (rooms,) int64, rows of ``MOVES``.

        Returns:
            The cells they are in now, and what they earn, 0 or 1; both (rooms,) int64.
        """
        self._places = (self._places + self._moves[actions]).clamp(0, self.size - 1)
        cells = self.cells
        return cells, (cells == self.goals).long()

    @property
    def cells(self) -> Tensor:
        """The cell in which each agent stands, (rooms,) int64."""
        return self._places[:, 0] * self.size + self._places[:, 1]


def best_return(goals: Tensor, size: int, episode_length: int) -> Tensor:
    """What an agent that knows its goal earns in an episode, (rooms,) int64: it walks there and stays."""
    middle = size // 2
    steps = (goals // size - middle).abs() + (goals % size - middle).abs()
    # The step that arrives earns, too; in the middle nobody has to walk.
    return (episode_length - (steps - 1).clamp(min=0)).clamp(min=0)


def split_goals(size: int, num_unseen: int, seed: int) -> tuple[Tensor, Tensor]:
    """The room's cells as goals to train with and goals never trained with, in a random order that ``seed`` gives."""
    cells = torch.randperm(size * size, generator=torch.Generator().manual_seed(seed))
    return cells[num_unseen:], cells[:num_unseen]
