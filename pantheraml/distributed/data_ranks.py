"""Which ranks have rows of their own: all of them, unless some compute each layer together, on the same rows.

With degree D, ranks 0 to D - 1 are a group, the next D another; the groups share the rows of a step between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch.distributed as dist

from pantheraml.config.combinations import refusal
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.process_group import get_rank, group_size
from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment

if TYPE_CHECKING:
    from torch import nn

    from pantheraml.models.tensor_group import TensorGroup

# The groups of this run by their size, beside the process group they were made of.
_groups: dict[int, tuple[object, TensorGroup]] = {}


@dataclass(frozen=True)
class DataRanks:
    """This rank's place among those that have rows of their own.

    Attributes:
        size: how many there are; ranks that share rows count as one.
        index: of this one, from 0.
        is_counted: whether sums over all ranks count this one's rows: of those that share rows, the first one's are.
    """

    size: int = 1
    index: int = 0
    is_counted: bool = True


def data_ranks(model: nn.Module) -> DataRanks:
    """Who has which rows when ``model`` is trained by the ranks that there are."""
    from pantheraml.models.sharded_linear import tensor_group_of

    if group_size() == 1:
        return DataRanks()
    group = tensor_group_of(model)
    together = 1 if group is None else group.size
    index, place = divmod(get_rank(), together)
    return DataRanks(group_size() // together, index, place == 0)


def config_for(model: nn.Module, config: MultiGPUConfig) -> MultiGPUConfig:
    """The settings with which several ranks train ``model``: the strategy follows from how it was loaded.

    Raises:
        ConfigError: ``config`` asks for another one.
    """
    from pantheraml.models.sharded_linear import tensor_group_of

    group = tensor_group_of(model)
    if group is None:
        if config.way == "tensor" and group_size() > 1:
            raise refusal(
                "tensor", "whole model", 'strategy="tensor" was given for a model that every rank has whole.'
            )
        return config
    if config.way == "auto":
        return replace(config, tensor_parallel=group.size)
    degree = group_size() if isinstance(config.tensor_parallel, bool) else config.tensor_parallel
    if config.way != "tensor" or degree != group.size:
        asked = f"tensor_parallel={degree}" if config.way == "tensor" else f"strategy={config.way!r}"
        raise refusal(
            "tensor", "another strategy", f"{asked} was given for a model of tensor_parallel={group.size}."
        )
    return config


def tensor_group(config: MultiGPUConfig) -> TensorGroup | None:
    """The ranks that compute each layer together with this one; every rank asks for it, before anything is loaded.

    Args:
        config: of the run; its degree, True or "tensor" alone is all ranks.

    Returns:
        None where the config asks for another strategy, or each rank computes by itself.

    Raises:
        ConfigError: ranks cannot be grouped like this.
    """
    from pantheraml.models.tensor_group import TensorGroup

    if config.way != "tensor":
        return None
    ranks = group_size()
    degree = ranks if isinstance(config.tensor_parallel, bool) else config.tensor_parallel
    _check(degree, ranks)
    if degree == 1:
        return None
    world = dist.group.WORLD
    known = _groups.get(degree)
    if known is None or known[0] is not world:
        mine, _ = dist.new_subgroups(degree)
        known = _groups[degree] = world, TensorGroup(cast(dist.ProcessGroup, mine))
    return known[1]


def _check(degree: int, ranks: int) -> None:
    """Refuse groups that do not come out even, or whose ranks are on several machines."""
    here = LaunchEnvironment.detect().local_world_size if ranks > 1 else 1
    valid = [n for n in range(1, here + 1) if here % n == 0 and ranks % n == 0]
    if degree in valid:
        return
    names = ", ".join(map(str, valid))
    raise ConfigError(
        got=f"tensor_parallel={degree} was given to {ranks} rank{'s' if ranks > 1 else ''}, {here} on this machine.",
        need="Ranks that compute each layer together are on one machine, and all groups have as many: the degree "
        f"divides both numbers, and is one of {names} here.",
        fix=f"Write tensor_parallel={valid[-1]}."
        if valid[-1] > 1
        else "Leave tensor_parallel out, or add GPUs.",
    )
