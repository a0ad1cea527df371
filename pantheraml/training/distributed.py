"""The trainer of a run on several GPUs: ``PantheraMLTrainer``, its ranks, and what they tell."""

from __future__ import annotations

import socket
from itertools import count
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.devices.memory import get_memory_stats
from pantheraml.distributed.process_group import (
    connect_store,
    gather_objects,
    get_rank,
    get_world_size,
    settings_of_run,
    setup_multi_gpu,
)
from pantheraml.distributed.questions import Question
from pantheraml.distributed.strategies.pipeline import check_is_split
from pantheraml.log import say
from pantheraml.models.request import check_policy
from pantheraml.models.split import is_split
from pantheraml.models.state import get_state
from pantheraml.training.banner import describe_ranks, device_names
from pantheraml.training.telemetry import Telemetry, number_devices
from pantheraml.training.trainer import PantheraMLTrainer


class PantheraMLDistributedTrainer(PantheraMLTrainer):
    """``PantheraMLTrainer`` on every GPU, with telemetry; one process alone is watched for hangs, too.

    Args:
        model: as for ``PantheraMLTrainer``.
        args: likewise; SFTConfig, PantheraMLTrainingArguments or TrainingArguments.
        multi_gpu_config: how the run is spread; None joins the ranks that there are.
        kwargs: everything else ``PantheraMLTrainer`` takes.

    Raises:
        ConfigError: settings that contradict each other, or what started the ranks.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        multi_gpu_config: MultiGPUConfig | None = None,
        **kwargs: Any,
    ) -> None:
        config = config_of(multi_gpu_config)
        self._multi_gpu = config if multi_gpu_config is not None else settings_of_run()
        # A split model has all GPUs already: there is none left for ranks.
        if (multi_gpu_config is not None and not is_split(model)) or get_world_size() > 1:
            setup_multi_gpu(config)
        if config.way == "pipeline":
            check_is_split(model)
        state = get_state(model)
        if state is not None and config.use_gradient_checkpointing != "auto":
            state.recompute = check_policy(config.use_gradient_checkpointing)
        super().__init__(model, args, **kwargs)
        self._telemetry = Telemetry(
            Path(self.args.output_dir or "outputs"), cast(nn.Module, self.model), self.args.device
        )
        self._memory: Question | None = None
        if get_world_size() > 1:
            self._memory = Question(
                f"memory_{next(_trainers)}", get_memory_stats, connect_store, get_rank(), get_world_size()
            )

    def _watching(self) -> MultiGPUConfig | None:
        return self._multi_gpu

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``PantheraMLTrainer`` does, and tell what it does to the GPUs at every logging step."""
        self._telemetry.begin(self._before.tokens)
        return super()._train(*args, **kwargs)

    def figures(self, tokens: int, logs: dict[str, float]) -> dict[str, float]:
        """Telemetry of the steps since the last log line, for the log."""
        totals = {"total_tokens": tokens, "total_seconds": self.seconds_trained()}
        return self._telemetry.measure(self.state.global_step, tokens, {**logs, **totals})

    def get_model_memory_usage(self) -> dict[str, dict[str, float]]:
        """Memory of the devices of all ranks in GiB: ``{"gpu_0": {...}, "gpu_1": {...}}``; any rank may ask, alone.

        A rank that does not answer within ten seconds is left out.
        """
        if self._memory is None:
            return super().get_model_memory_usage()
        return number_devices([answer or {} for answer in self._memory.ask()])

    def _say_plan(self) -> None:
        """Who takes part, and then as ``PantheraMLTrainer``."""
        places = gather_objects(
            (socket.gethostname(), device_names(cast(nn.Module, self.model), self.args.device))
        )
        if len(places) > 1:
            say(describe_ranks(places, self._strategy.describe()))
        super()._say_plan()


# Trainers are built in the same order on all ranks.
_trainers = count()

UnslothDistributedTrainer = PantheraMLDistributedTrainer
