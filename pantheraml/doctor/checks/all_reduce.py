"""An all-reduce over all ranks: are the sums right, and how fast do they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding
from pantheraml.doctor.links import Link, read_peer_link, slowest
from pantheraml.doctor.ranks import call_on_ranks

if TYPE_CHECKING:
    from torch import Tensor

NAME = "all-reduce"
# Float32 numbers in a sum: enough for a link's whole speed on GPUs, and for right or wrong on CPUs.
_ON_GPUS, _ON_CPUS = 64 * 2**20, 2**20
_REPEATS = 10


@dataclass(frozen=True)
class Facts:
    """What the ranks found.

    Attributes:
        backend: by which they talk (``nccl`` or ``gloo``).
        wrong: wrong numbers, by rank.
        rate: GB/s over each link of a ring (what nccl-tests calls bus bandwidth).
        link: the slowest between two GPUs; None on CPUs.
    """

    backend: str
    wrong: tuple[int, ...]
    rate: float
    link: Link | None


def probe(gpus: int) -> Facts:
    """Start the ranks and let them sum."""
    return call_on_ranks(reduce_numbers, _ON_GPUS if gpus > 1 else _ON_CPUS, gpus=gpus)


def contribution(rank: int, count: int) -> Tensor:
    """What a rank adds: float32 (count,), whole numbers, so that sums over up to 1,000 ranks are exact."""
    import torch

    return (torch.arange(31.0) + 1).repeat(count // 31 + 1)[:count] * (rank + 1)


def reduce_numbers(count: int, contribute: Callable[[int, int], Tensor] = contribution) -> Facts:
    """What each rank does; the facts of all, on every rank.

    Args:
        count: numbers in the sum.
        contribute: makes them of the rank and their count.
    """
    import torch
    import torch.distributed as dist

    from pantheraml.distributed.process_group import gather_objects, get_rank, get_world_size, rank_device

    ranks, device = get_world_size(), rank_device()
    total = contribute(get_rank(), count).to(device)
    dist.all_reduce(total)
    right = contribution(0, count) * (ranks * (ranks + 1) // 2)
    wrong = int((total.cpu() != right).sum())
    best = float("inf")
    for repeat in range(_REPEATS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(total)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat > 1:  # the first ones connect the ranks
            best = min(best, time.perf_counter() - began)
    rate = 2 * (ranks - 1) / ranks * total.nbytes / best / 1e9
    found: list[tuple[int, float]] = gather_objects((wrong, rate))
    on_gpus = device.type == "cuda"
    pairs = [(first, second) for first in range(ranks) for second in range(first)] if on_gpus else []
    return Facts(
        backend="nccl" if on_gpus else "gloo",
        wrong=tuple(wrong for wrong, _ in found),
        rate=min(rate for _, rate in found),
        link=slowest([read_peer_link(*pair) for pair in pairs]),
    )


def judge(facts: Facts) -> list[Finding]:
    """One row."""
    ranks = f"{len(facts.wrong)} ranks ({facts.backend})"
    if any(facts.wrong):
        where = ", ".join(
            f"{count} numbers on rank {rank}" for rank, count in enumerate(facts.wrong) if count
        )
        fix = (
            "Do not train on several ranks. Type NCCL_P2P_DISABLE=1 pantheraml doctor: if sums are right then, the "
            "links between GPUs are at fault."
        )
        return [Finding(NAME, "bad", f"sums over {ranks} are wrong: {where}", fix)]
    seen = f"sums over {ranks} are right"
    if facts.link is None:
        return [Finding(NAME, "ok", seen)]
    seen += f", {facts.rate:.0f} GB/s ({facts.link.describe()})"
    expected = facts.link.expected
    if expected is None or facts.rate >= expected:
        return [Finding(NAME, "ok", seen)]
    fix = "Type NCCL_DEBUG=INFO pantheraml doctor --quick, and nvidia-smi topo -m: NCCL may take another way."
    return [Finding(NAME, "note", f"{seen}, expected {expected:.0f}", fix)]


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails="Type NCCL_P2P_DISABLE=1 pantheraml doctor: if that is green, GPUs do not reach one another. "
    "NCCL_SOCKET_IFNAME=lo (GLOO_SOCKET_IFNAME=lo) helps where a network interface is at fault.",
    seconds=150,
    counts=True,
)
