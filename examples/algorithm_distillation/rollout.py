"""A trained model in rooms that it does not know: it learns from its context alone, with its weights as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from darkroom import NUM_ACTIONS, Darkroom
from settings import Settings
from transformer import HistoryTransformer


class Curve(NamedTuple):
    """Mean return of each episode over rooms, and the standard error of that mean."""

    mean: list[float]
    error: list[float]


def curve_of(returns: Tensor) -> Curve:
    """The curve of returns (rooms, episodes)."""
    returns = returns.double()
    error = returns.std(0, correction=min(1, len(returns) - 1)) / len(returns) ** 0.5
    return Curve(returns.mean(0).tolist(), error.tolist())


@torch.inference_mode()
def roll_out(model: HistoryTransformer, goals: Tensor, numbers: Sequence[int], settings: Settings) -> Tensor:
    """Let ``model`` act in a room for each goal, for as many episodes as a history has.

    Its context is what it saw, did and earned in that room from the first episode on. An action is drawn from what it
    says, by chance that belongs to the room's number: the same whoever rolls it out, beside whichever others.

    Args:
        model: in no wrapper.
        goals: (rooms,) int64, on the device of the model.
        numbers: of the rooms.

    Returns:
        Returns, (rooms, episodes) int64 on the CPU.
    """
    room, cache = Darkroom(goals, settings.grid_size), model.empty_cache()
    noise = torch.stack([_gumbel(settings, number) for number in numbers]).to(goals.device)
    nothing = torch.zeros_like(goals)
    earned: list[Tensor] = []
    for episode in range(settings.context_episodes):
        cells, last_actions, last_rewards, total = room.reset(), nothing, nothing, nothing
        for step in range(settings.episode_length):
            history = (cells[:, None], last_actions[:, None], last_rewards[:, None])
            logits = model(*history, cache)[:, -1]
            # The largest of logits with Gumbel noise is a draw from their softmax.
            actions = (logits + noise[:, episode * settings.episode_length + step]).argmax(-1)
            cells, last_rewards = room.step(actions)
            last_actions, total = actions + 1, total + last_rewards
        earned.append(total)
    return torch.stack(earned, 1).cpu()


def _gumbel(settings: Settings, number: int) -> Tensor:
    """The chance of one room, (steps, actions) float32."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    noise = torch.empty(settings.n_transit, NUM_ACTIONS).exponential_(generator=generator)
    return -noise.log()


def evaluate(accelerator: Accelerator, model: HistoryTransformer, goals: Tensor, settings: Settings) -> Curve:
    """The curve of ``model`` in rooms with these goals; ranks share the rooms, and all get the whole curve."""
    rooms = goals.repeat(settings.rooms_per_unseen_goal)
    mine = range(accelerator.process_index, len(rooms), accelerator.num_processes)
    returns: list[list[int]] = []
    for first in range(0, len(mine), settings.test_batch_size):
        numbers = mine[first : first + settings.test_batch_size]
        some = rooms[list(numbers)].to(accelerator.device)
        returns += roll_out(model, some, numbers, settings).tolist()
    return curve_of(torch.tensor(gather_object(returns)))


def plot(curves: dict[str, Curve], best: float, file: Path) -> None:
    """Draw curves over the episodes, and the best return that can be had, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        episodes = range(1, len(curve.mean) + 1)
        low = [mean - error for mean, error in zip(*curve, strict=True)]
        high = [mean + error for mean, error in zip(*curve, strict=True)]
        axes.plot(episodes, curve.mean, marker="o", markersize=3, label=name)
        axes.fill_between(episodes, low, high, alpha=0.2)
    axes.axhline(best, color="gray", linestyle="--", label="who knows the goal")
    axes.set(xlabel="episode", ylabel="return (mean, standard error)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", frameon=False)
    figure.savefig(file, dpi=150)
