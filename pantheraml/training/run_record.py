"""A checkpoint says what its run was told and has come to, and a run that goes on says what is not as it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pantheraml.checkpoint.resuming import STATE
from pantheraml.checkpoint.run_record import Totals, other_versions, read_totals, write_record
from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.devices.memory import get_memory_stats
from pantheraml.distributed.process_group import all_reduce_scalar, gather_objects, is_main_process
from pantheraml.log import say
from pantheraml.training.banner import Predicted, compare_memory
from pantheraml.training.memory_record import memory_record, write_memory_record
from pantheraml.training.repeatable import RepeatableRun


class RecordedRun(RepeatableRun):
    """The part of the trainer that counts what a run comes to, over all its starts."""

    _multi_gpu: MultiGPUConfig | None = None
    # What a step takes of each device of this rank, by the estimate.
    _predicted: Predicted | None = None
    # Of the starts before this one, when this one began, and the step it began behind.
    _before, _began, _first_step = Totals(), 0.0, 0

    @contextmanager
    def going_on(self, resume: str | bool | None) -> Iterator[None]:
        """As ``RepeatableRun``; totals go on from the checkpoint's."""
        checkpoint = Path(resume) if isinstance(resume, str) else None
        self._before = Totals() if checkpoint is None else read_totals(checkpoint)
        self._total_train_tokens, self._began = self._before.tokens, time.perf_counter()
        self._first_step = (
            0 if checkpoint is None else json.loads((checkpoint / STATE).read_text())["global_step"]
        )
        others = [] if checkpoint is None else other_versions(checkpoint)
        if checkpoint is not None and others:
            say(
                f"{checkpoint.name} was saved with {', '.join(others)}: the run goes on, maybe not bit by bit."
            )
        with super().going_on(resume):
            yield

    @property
    def steps_done(self) -> int:
        """Steps since the run began, or went on; none where it was over."""
        return self.state.global_step - self._first_step

    def tokens_seen(self) -> int:
        """Tokens trained on so far, of all ranks; every rank calls this."""
        return int(self._total_train_tokens)

    def seconds_trained(self) -> float:
        """Seconds of training so far."""
        return self._before.seconds + time.perf_counter() - self._began

    def totals(self) -> Totals:
        """What the run has come to; every rank calls this."""
        mine = [row["peak_allocated"] for row in get_memory_stats().values() if "peak_allocated" in row]
        peaks = [peak for rank in gather_objects(mine) for peak in rank]
        if self._before.peak_allocated_gib is not None:
            peaks.append(self._before.peak_allocated_gib)
        return Totals(self.tokens_seen(), self.seconds_trained(), max(peaks, default=None))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers, which takes a rank's own loss for that of the steps that no log line has; and as its newer
        versions, which divide by the steps of this start.
        """
        self._tr_loss.fill_(all_reduce_scalar(self._tr_loss.item(), "mean"))
        if self.steps_done and not hasattr(
            self, "_initial_global_step"
        ):  # 5.17 divides by those of all starts
            rest = self._tr_loss.item()
            share = self.steps_done / self.state.global_step
            self._total_loss_scalar = (self._total_loss_scalar + rest) / share - rest
        return super()._finalize_training(*args, **kwargs)

    def write_record(self, checkpoint: Path, totals: Totals) -> None:
        """Write ``run.json`` into the folder of a checkpoint."""
        settings: dict[str, Any] = {
            "arguments": self.args.to_dict(),
            "multi_gpu": asdict(config_of(self._multi_gpu)),
        }
        if self._predicted:
            settings["memory"] = memory_record(self._predicted)
        write_record(checkpoint, settings, totals)

    def tell_peaks(self, predicted: Predicted, measured: Sequence[Sequence[float]]) -> None:
        """Say the peaks of all ranks, ``measured[rank][device]`` in GiB, beside what was predicted, and keep both."""
        say(compare_memory(predicted, measured))
        if is_main_process():
            write_memory_record(Path(self.args.output_dir or "outputs"), memory_record(predicted, measured))
