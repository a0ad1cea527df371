"""Agents that learn their room by trial and error, and the histories of their learning.

Each is a table of action values, learned by Q-learning (Watkins, 1989) while it acts:

    Q[cell, action] += rate x (reward + discount x max Q[next cell] - Q[cell, action])

Values start too high (at 1), so that what was not tried yet looks good and gets tried; some actions are random, fewer
and fewer. An agent needs some 200 episodes to learn its way in a room of 9 x 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from darkroom import NUM_ACTIONS, Darkroom

RATE, DISCOUNT, FIRST_VALUE, FIRST_RANDOM = 0.5, 0.9, 1.0, 0.3


class Histories(NamedTuple):
    """What agents saw, did and earned; each (agents, episodes that are told of, steps) int16.

    Attributes:
        cells: where an agent stood before it acted.
        actions: what it did.
        rewards: what it earned for that.
    """

    cells: Tensor
    actions: Tensor
    rewards: Tensor

    def returns(self) -> Tensor:
        """What each agent earned in each episode, (agents, episodes)."""
        return self.rewards.sum(-1)


def spread(episodes: int, count: int) -> list[int]:
    """``count`` of so many episodes, from the first to the last at equal distances: the same learning in less time."""
    return torch.linspace(0, episodes - 1, count).round().long().tolist()


def learn(
    goals: Tensor, size: int, episodes: int, episode_length: int, kept: Sequence[int], seed: int
) -> Histories:
    """Let one agent learn in each room, all at once.

    Args:
        goals: (agents,) int64, the goal of each agent's room; a goal may come several times, chance differs.
        size: cells along a wall.
        episodes: how many each agent lives through.
        episode_length: steps of one.
        kept: the episodes that are told of.
        seed: of all chance.
    """
    chance = torch.Generator().manual_seed(seed)
    room, agents = Darkroom(goals, size), torch.arange(len(goals))
    values = torch.full((len(goals), size * size, NUM_ACTIONS), FIRST_VALUE)
    told = Histories(
        *(torch.zeros(len(goals), len(kept), episode_length, dtype=torch.int16) for _ in range(3))
    )
    for episode in range(episodes):
        random_share = FIRST_RANDOM * (1 - episode / max(1, episodes - 1))
        cells = room.reset()
        for step in range(episode_length):
            # Of equal values, any: without the noise it would always be the first.
            noise = 1e-6 * torch.rand(len(goals), NUM_ACTIONS, generator=chance)
            best = (values[agents, cells] + noise).argmax(-1)
            anything = torch.randint(NUM_ACTIONS, best.shape, generator=chance)
            is_random = torch.rand(best.shape, generator=chance) < random_share
            actions = torch.where(is_random, anything, best)
            following, rewards = room.step(actions)
            target = rewards + DISCOUNT * values[agents, following].amax(-1)
            values[agents, cells, actions] += RATE * (target - values[agents, cells, actions])
            if episode in kept:
                for one, now in zip(told, (cells, actions, rewards), strict=True):
                    one[:, kept.index(episode), step] = now
            cells = following
    return told
