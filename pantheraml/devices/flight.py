"""How many micro-batches a GPU of a pipeline holds at a time, which both the planner and the schedule ask for."""

from __future__ import annotations


def forwards_ahead(later: int, gpus: int, micro_batches: int, rounds: int = 1) -> int:
    """Forwards of stages that a GPU does before its first backward; so many graphs it then holds at a time.

    In one round (each GPU has one stage) it begins as many as there are GPUs from here to the end. In several rounds a
    token comes to every GPU once a round, and the GPU goes on with new micro-batches until the first one is back from
    its last (Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters").

    Args:
        later: GPUs behind this one.
        gpus: all GPUs.
        micro_batches: of a step.
        rounds: stages of each GPU.
    """
    ahead = later + 1 if rounds == 1 else 2 * later + (rounds - 1) * gpus + 1
    return min(ahead, micro_batches * rounds)


def in_flight(later: int, gpus: int, micro_batches: int, rounds: int = 1) -> float:
    """The same as micro-batches that all layers of the GPU hold."""
    return forwards_ahead(later, gpus, micro_batches, rounds) / rounds
