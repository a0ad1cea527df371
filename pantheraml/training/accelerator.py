"""accelerate's view of a run before there is a trainer: the state that the trainer will have."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn
from transformers import TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.process_group import group_size
from pantheraml.distributed.strategies.choose import strategy_of
from pantheraml.log import say_once
from pantheraml.models.zero3 import launched_alone
from pantheraml.training.arguments import PantheraMLTrainingArguments, join_ranks


class LastingAccelerator(Accelerator):
    """An accelerator that knows its process also where training arguments have cleared accelerate's state.

    It is whole again when a trainer is built of these arguments.
    """

    @property
    def state(self) -> Any:
        """accelerate's state, or the part of it that knows processes and device alone."""
        return self._state if AcceleratorState._shared_state else PartialState()

    @state.setter
    def state(self, state: AcceleratorState) -> None:
        self._state = state


def build_accelerator(config: MultiGPUConfig, args: TrainingArguments | None) -> Accelerator:
    """An accelerator of this rank, as a trainer with ``config`` and ``args`` will have it.

    Args:
        config: of the run.
        args: made those of this rank, in place. None goes on with the state that there is, or else takes our defaults.
    """
    plugin = GradientAccumulationPlugin(
        num_steps=1
    )  # the trainer accumulates by itself, and shares this state
    with launched_alone():
        if args is None and _is_state_of(config):
            return LastingAccelerator(gradient_accumulation_plugin=plugin)
        if args is not None:
            join_ranks(args, group_size())
        # A copy: what DeepSpeed fills in follows from numbers that may change until there is a trainer.
        own = PantheraMLTrainingArguments() if args is None else copy.copy(args)
        join_ranks(own, group_size())
        unloaded = nn.Module()
        strategy = strategy_of(config, group_size(), unloaded, own)
        if config.way == "deepspeed" and strategy.name != "deepspeed":
            say_once("one process trains without DeepSpeed.")
        strategy.prepare(own)
        AcceleratorState._reset_state()  # of other arguments, which may have another precision
        return LastingAccelerator(
            mixed_precision=own.mixed_precision,
            deepspeed_plugin=own.deepspeed_plugin,
            gradient_accumulation_plugin=plugin,
        )


def _is_state_of(config: MultiGPUConfig) -> bool:
    """Whether accelerate has a state that a run with ``config`` can go on with."""
    known = AcceleratorState._shared_state.get("distributed_type")
    is_deepspeed = config.way == "deepspeed" and group_size() > 1
    return known is not None and (known == DistributedType.DEEPSPEED) == is_deepspeed
