"""What the main process shows and writes of a run: banner, progress bar, TensorBoard, figures, speed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from pantheraml.log import say
from settings import Settings

LINE = "=" * 60


class Journal:
    """Every rank has one; what is shown and written is so by the main process alone.

    Args:
        accelerator: of the run.
        folder: gets ``metrics.jsonl``, ``summary.json`` and, in ``tensorboard``, the event files.
        settings: of the run.
        done: steps that were done before, where a run goes on.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, settings: Settings, done: int) -> None:
        self._accelerator, self._folder, self._settings = accelerator, folder, settings
        self._is_main = accelerator.is_main_process
        self._seconds, self._timed_steps, self._since = 0.0, 0, (done, time.perf_counter())
        self._is_warm = False
        accelerator.init_trackers("tensorboard")
        if self._is_main and not accelerator.trackers:
            say("TensorBoard is not installed: pip install tensorboard, to look at the run with it.")
        if self._is_main and done == 0:
            self._metrics.unlink(missing_ok=True)
        self._bar = tqdm(total=settings.train_steps, initial=done, desc="steps", disable=not self._is_main)

    @property
    def _metrics(self) -> Path:
        return self._folder / "metrics.jsonl"

    def banner(self, num_rows: int, num_parameters: int) -> None:
        """Who trains what, and of what a step is made."""
        accelerator, settings = self._accelerator, self._settings
        each = (settings.train_batch_size, accelerator.num_processes, accelerator.gradient_accumulation_steps)
        rows = each[0] * each[1] * each[2]
        self.tell(
            f"{LINE}\nMulti-GPU Training Configuration\n{LINE}\n"
            f"Number of processes: {accelerator.num_processes}\n"
            f"Distributed type: {accelerator.distributed_type}\n"
            f"Mixed precision: {accelerator.mixed_precision}\n"
            f"Gradient accumulation steps: {accelerator.gradient_accumulation_steps}\n"
            f"Main process device: {accelerator.device}\n"
            f"Histories a step: {' x '.join(map(str, each))} = {rows} (per device x processes x accumulation)\n"
            f"Histories: {num_rows}, of {settings.n_transit} steps each\n"
            f"Parameters: {num_parameters:,}\n{LINE}"
        )

    def tell(self, text: str) -> None:
        """Print above the progress bar."""
        if self._is_main:
            self._bar.write(text)

    def step(self) -> None:
        """A step is done."""
        self._bar.update(1)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step. The device must have done all that came before, so that time can be told."""
        begun, since = self._since
        if self._is_warm:  # the first steps allocate and tune
            self._seconds += time.perf_counter() - since
            self._timed_steps += step - begun
        self._is_warm = True
        self.write(step, figures)
        self.go_on(step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Figures for TensorBoard and the file."""
        self._accelerator.log(figures, step=step)
        if self._is_main:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")

    def go_on(self, step: int) -> None:
        """Training goes on after ``step``: what came between, evaluation or saving, is not counted as its time."""
        self._since = (step, time.perf_counter())

    def close(self, **figures: Any) -> None:
        """Write the summary: speed, and ``figures``."""
        accelerator, settings = self._accelerator, self._settings
        rows = settings.train_batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
        seconds = self._seconds / self._timed_steps if self._timed_steps else None
        is_gpu = accelerator.device.type == "cuda"
        summary = {
            "processes": accelerator.num_processes,
            "device": torch.cuda.get_device_name() if is_gpu else "CPU",
            "mixed_precision": accelerator.mixed_precision,
            "histories_per_step": rows,
            "timed_steps": self._timed_steps,
            "ms_per_step": seconds and 1e3 * seconds,
            "transitions_per_second": seconds and rows * settings.n_transit / seconds,
            **figures,
        }
        if self._is_main:
            (self._folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        if seconds:
            self.tell(
                f"{1e3 * seconds:.1f} ms a step, {rows * settings.n_transit / seconds:,.0f} transitions a second"
            )
        self._bar.close()
        for tracker in accelerator.trackers:
            tracker.finish()
