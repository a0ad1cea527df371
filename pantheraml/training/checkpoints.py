"""A run's checkpoints are whole or not there, and a run goes on only with a whole one.

transformers writes what it writes, into a hidden folder beside the run's checkpoints; when every rank is done, the
first one lists the files in a manifest and gives the folder its name.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pantheraml.checkpoint.manifest import has_manifest, problems
from pantheraml.checkpoint.names import step_of
from pantheraml.checkpoint.partial import removed_on_failure
from pantheraml.checkpoint.pointers import BEST, point
from pantheraml.checkpoint.resuming import STATE, newest_whole
from pantheraml.checkpoint.retention import retain
from pantheraml.checkpoint.unfinished import publish, saving
from pantheraml.distributed.process_group import barrier, broadcast_object
from pantheraml.errors import CheckpointError
from pantheraml.log import say
from pantheraml.training.resuming import ResumedRows

# The newest checkpoint, or none: what a script that is started again and again says.
AUTO = "auto"
_NUMBERED = f"{PREFIX_CHECKPOINT_DIR}-"


class WholeCheckpoints(ResumedRows):
    """The part of the trainer that saves checkpoints, and says which one a run goes on with."""

    # The hidden folder that a checkpoint is written to now.
    _saving_in: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written."""
        return super()._get_output_dir(trial=trial) if self._saving_in is None else self._saving_in

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as TRL does; a checkpoint that cannot be finished is not there, older ones stay."""
        run, step = self._get_output_dir(trial=trial), self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        # Each on a disk of its own, where nobody says when all are done; or uploaded beside the training, by its name.
        if self.args.save_on_each_node or self.args.push_to_hub:
            with removed_on_failure(Path(run, name)):
                super()._save_checkpoint(model, trial)
                self.cursor().write(Path(run, name))
            return
        is_first = self.is_world_process_zero()
        with saving(run, step) if is_first else nullcontext() as save:
            self._saving_in = home = broadcast_object(None if save is None else str(save.home))
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None
            self._name_best(run, home or "", name)
            barrier()  # every rank has written
            if save is not None:
                cursor = self.cursor()
                cursor.write(save.folder)
                publish(
                    save, {"cursor": asdict(cursor), "ranks": self.args.world_size, "epoch": self.state.epoch}
                )
        if is_first:
            self._point_to_best(run)
            retain(run, self.args.save_total_limit)
        barrier()  # nobody looks for it before it is there

    def _name_best(self, run: str, home: str, name: str) -> None:
        """The best checkpoint, if it is this one, by the name that it will have."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).parent != Path(home):
            return
        self.state.best_model_checkpoint = os.path.join(run, name)  # noqa: PTH118 (as transformers writes it)
        if self.args.should_save:
            self.state.save_to_json(str(Path(home, name, STATE)))

    def _point_to_best(self, run: str) -> None:
        best, value = self.state.best_model_checkpoint, self.state.best_metric
        step = None if best is None else step_of(Path(best).name)
        if best is not None and step is not None and Path(best).parent == Path(run) and Path(best).is_dir():
            point(Path(run), BEST, step, metric=self.args.metric_for_best_model, value=value)

    def checkpoint_of(self, resume: str | Path | bool | None) -> str | bool | None:
        """The checkpoint that a run goes on with, the same on all ranks; what is damaged is passed over by name.

        Args:
            resume: a folder; True: the newest whole one of ``output_dir``; "auto": the same, or none where nothing was
                saved yet; None or False: none.

        Raises:
            CheckpointError: the folder is damaged, or no checkpoint is whole.
        """
        if not resume:
            return None
        found, said = broadcast_object(self._look_for(resume) if self.is_world_process_zero() else None) or (
            None,
            [],
        )
        if resume in (True, AUTO):
            for line in said:
                say(line)
            if found is None and resume == AUTO and not any(line.startswith(_NUMBERED) for line in said):
                return None  # an unfinished first save, at most
            if found is None and any(PREFIX_CHECKPOINT_DIR in line for line in said):
                raise CheckpointError(
                    got=f"resume_from_checkpoint={resume!r} was given, and {self.args.output_dir} has no whole "
                    "checkpoint.",
                    need="A run goes on only with one whose files are what was saved. " + " ".join(said),
                    fix="Remove what is damaged and start anew, or give the folder of another run's checkpoint.",
                )
            return found or True  # transformers says that there is none
        if said:
            raise CheckpointError(
                got=f"resume_from_checkpoint={str(resume)!r} was given. {' '.join(said)}",
                need="A run goes on only with a checkpoint whose files are what was saved.",
                fix="Take an older one, or resume_from_checkpoint=True for the newest that is whole.",
            )
        return str(resume)

    def _look_for(self, resume: str | Path | bool) -> tuple[str | None, list[str]]:
        """The folder, and what is wrong with it or was passed over before it."""
        if resume in (True, AUTO):
            choice = newest_whole(self.args.output_dir or ".")
            return None if choice.folder is None else str(choice.folder), [
                str(one) for one in choice.passed_over
            ]
        folder = Path(str(resume))
        return str(folder), problems(folder) if has_manifest(folder) else []
