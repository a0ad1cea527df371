"""Algorithm distillation on every GPU: a transformer learns how others learn. Plain torch and accelerate.

    python examples/algorithm_distillation/train.py
    accelerate launch --num_processes 2 examples/algorithm_distillation/train.py
    accelerate launch --gpu_ids 0,1 examples/algorithm_distillation/train.py
    torchrun --nproc_per_node=2 examples/algorithm_distillation/train.py
    sbatch examples/algorithm_distillation/multi_gpu_train.slurm

Plain python takes all visible GPUs; without a GPU one process trains on the CPU, and --num-processes 2 starts two.
Settings are those of --config, and words replace some of them: train.py train_steps=100 mixed_precision=bf16.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from checkpoint import load_checkpoint, save_checkpoint
from darkroom import best_return, split_goals
from histories import EndlessBatches, HistoryRows
from journal import Journal
from learner import Histories, learn, spread
from pantheraml import MultiGPUConfig, setup_multi_gpu
from rollout import Curve, curve_of, evaluate, plot
from settings import Settings, load_settings
from transformer import HistoryTransformer

HERE = Path(__file__).parent


class Training:
    """A run: its data, model and optimizer on this rank, and what is done with them.

    Args:
        settings: of the run.
        folder: gets the checkpoint and all that is written.
        resume: go on with the folder's checkpoint, if there is one.
    """

    def __init__(self, settings: Settings, folder: Path, *, resume: bool = False) -> None:
        self.settings, self.folder = settings, folder
        self.accelerator = accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # without it, accelerate takes each rank without a GPU for a run alone
            mixed_precision=_precision(settings),
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            log_with="tensorboard" if is_tensorboard_available() else None,
            project_dir=folder,
        )
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        self.goals, self.unseen = split_goals(settings.grid_size, settings.unseen_goals, settings.seed)
        rows = HistoryRows(
            self._learn(self.goals, spread(settings.learner_episodes, settings.context_episodes))
        )
        torch.manual_seed(settings.seed)
        self.model = HistoryTransformer(
            settings.grid_size,
            settings.n_transit,
            settings.tf_n_embd,
            settings.tf_n_layer,
            settings.tf_n_head,
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99)
        )
        micro_batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
        self.rows_of_step = settings.train_batch_size * micro_batches
        batches = EndlessBatches(len(rows), settings.train_batch_size, seed=settings.seed)
        loader = DataLoader(
            rows, batch_sampler=batches, collate_fn=dict, num_workers=settings.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        self.model, self.optimizer, self.loader = accelerator.prepare(self.model, self.optimizer, loader)
        self.done = 0
        if resume and self.checkpoint.exists():
            self.done = load_checkpoint(
                self.checkpoint, accelerator, self.model, self.optimizer, self._identity
            )
        batches.start = self.done * self.rows_of_step
        self.journal = Journal(accelerator, folder, settings, self.done)
        self.journal.banner(len(rows), sum(one.numel() for one in self.model.parameters()))

    @property
    def checkpoint(self) -> Path:
        """The file that a run goes on with."""
        return self.folder / "checkpoint.pt"

    @property
    def _identity(self) -> dict[str, Any]:
        """What makes this run the one that it is."""
        return {**self.settings.what_decides(), "histories_per_step": self.rows_of_step}

    @property
    def plain_model(self) -> HistoryTransformer:
        """The model in no wrapper of ranks: its weights have their own names, and no other rank need call it."""
        return self.accelerator.unwrap_model(self.model)

    def run(self) -> Curve:
        """Train up to the last step, evaluating and saving on the way; returns the last evaluation."""
        settings, journal, batches = self.settings, self.journal, iter(self.loader)
        curve = None
        for step in range(self.done + 1, settings.train_steps + 1):
            loss = self._step(step, batches)
            is_last = step == settings.train_steps
            journal.step()
            if step % settings.log_every == 0 or is_last:
                mean = self.accelerator.reduce(loss, "mean").item()
                journal.log(step, {"loss": mean, "learning_rate": self._rate(step)})
            if is_last or (settings.eval_every and step % settings.eval_every == 0):
                curve = self._evaluate(step)
            if is_last or (settings.save_every and step % settings.save_every == 0):
                self._save(step)
        return self._finish(curve or self._evaluate(self.done))

    def _step(self, step: int, batches: Any) -> torch.Tensor:
        """One optimizer step; returns this rank's mean loss, of all its micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.accelerator.gradient_accumulation_steps):
            batch = next(batches)
            # Ranks talk in the last backward only, and each loss counts as one of so many: all batches are of one size.
            with self.accelerator.accumulate(self.model):
                logits = self.model(batch["cells"], batch["last_actions"], batch["last_rewards"])
                loss = cross_entropy(logits.flatten(0, 1), batch["actions"].flatten())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / self.accelerator.gradient_accumulation_steps
        return total

    def _rate(self, step: int) -> float:
        """Learning rate of a step: up in a line, down in half a cosine to a tenth."""
        settings = self.settings
        rising = min(1.0, step / max(1, settings.warmup_steps))
        falling = 0.55 + 0.45 * math.cos(math.pi * step / settings.train_steps)
        return settings.learning_rate * rising * falling

    def _learn(self, goals: torch.Tensor, kept: Sequence[int]) -> Histories:
        """The histories of learners in rooms with these goals; every rank makes the same ones, in seconds."""
        settings = self.settings
        goals = goals.repeat(settings.learners_per_goal)
        size, length = settings.grid_size, settings.episode_length
        return learn(goals, size, settings.learner_episodes, length, kept, settings.seed)

    def _save(self, step: int) -> None:
        prepared = (self.accelerator, self.model, self.optimizer)
        save_checkpoint(self.checkpoint, *prepared, step=step, run=self._identity)
        self.journal.go_on(step)

    def _evaluate(self, step: int) -> Curve:
        model = self.plain_model.eval()
        curve = evaluate(self.accelerator, model, self.unseen, self.settings)
        model.train()
        self.journal.write(step, {"first_return": curve.mean[0], "last_return": curve.mean[-1]})
        shown = " ".join(f"{mean:.1f}" for mean in curve.mean)
        self.journal.tell(f"step {step}: return in rooms with unseen goals, by episode: {shown}")
        self.journal.go_on(step)
        return curve

    def _finish(self, curve: Curve) -> Curve:
        """The plot and the summary; the others go, too, when the main process is done."""
        settings, accelerator = self.settings, self.accelerator
        best = best_return(self.unseen, settings.grid_size, settings.episode_length).double().mean().item()
        self.journal.close(returns=curve.mean, best_return=best)
        if not find_spec("matplotlib"):
            self.journal.tell("There is no plot: pip install matplotlib, and type the same with --resume.")
        elif accelerator.is_main_process:
            plot(self._curves(curve), best, self.folder / "in_context.png")
        accelerator.wait_for_everyone()
        return curve

    def _curves(self, curve: Curve) -> dict[str, Curve]:
        """What is drawn: the model, and those whose learning it learned from, in the same rooms."""
        settings = self.settings
        learners = self._learn(self.unseen, range(settings.context_episodes))
        theirs = f"Q-learning there, the first of its {settings.learner_episodes} episodes"
        return {
            "transformer in rooms with unseen goals, weights fixed": curve,
            theirs: curve_of(learners.returns()),
        }


def _precision(settings: Settings) -> str:
    """The precision of ``accelerate launch --mixed_precision``; of the settings where that is "no", or not there."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return settings.mixed_precision if launched == "no" else launched


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="settings that replace those of the file: key=value")
    parser.add_argument("--config", type=Path, default=HERE / "config" / "darkroom.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/darkroom"))
    parser.add_argument(
        "--resume", action="store_true", help="go on with the checkpoint there, if there is one"
    )
    parser.add_argument(
        "--num-processes", type=int, help="ranks on this machine; by default one for each GPU"
    )
    options = parser.parse_args()
    settings = load_settings(options.config, options.settings)
    # Plain python becomes several ranks here. Each of them runs the script from the beginning and comes past this line.
    setup_multi_gpu(MultiGPUConfig(num_processes=options.num_processes))
    Training(settings, options.output, resume=options.resume).run()


if __name__ == "__main__":
    main()
