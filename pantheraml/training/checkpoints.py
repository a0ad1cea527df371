"""A run's checkpoints are whole or not there, and a run goes on only with a whole one.

transformers writes what it writes, into a hidden folder beside the run's checkpoints; when every rank is done, the
first one lists the files in a manifest and gives the folder its name. What ranks write in parts, each measures itself.
Machines without a disk in common have a checkpoint each (``save_on_each_node``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pantheraml.checkpoint.folder_files import Measured
from pantheraml.checkpoint.manifest import has_manifest, measure_own, problems
from pantheraml.checkpoint.names import checkpoint_name, step_of
from pantheraml.checkpoint.pointers import BEST, point
from pantheraml.checkpoint.resuming import STATE, newest_whole, why_none
from pantheraml.checkpoint.retention import retain
from pantheraml.checkpoint.run_record import Totals
from pantheraml.checkpoint.state_parts import own_files
from pantheraml.checkpoint.unfinished import Unfinished, publish, saving
from pantheraml.distributed.process_group import gather_objects
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.errors import CheckpointError
from pantheraml.export.one_rank import written_here
from pantheraml.log import say
from pantheraml.training.agreeing import agreeing
from pantheraml.training.async_saves import AsyncSaves, Writes

Best = tuple[int, float | None] | None
Files = dict[str, Measured]

# The newest checkpoint, or none: what a script that is started again and again says.
AUTO = "auto"


class _Looked(NamedTuple):
    """The folder of a checkpoint, what is wrong with it or was passed over before it, and whether a checkpoint was."""

    folder: str | None
    said: list[str]
    is_damaged: bool


class WholeCheckpoints(AsyncSaves):
    """The part of the trainer that saves checkpoints, and says which one a run goes on with."""

    _strategy: Strategy
    # The hidden folder that a checkpoint is written to now.
    _saving_in: str | None = None
    # What has failed of the checkpoint that is written now, to be raised when all ranks are past TRL's barriers.
    _late: list[Exception] | None = None

    @property
    def _writer(self) -> int:
        """The rank that writes the checkpoints which this one sees: the first of all, or of its machine."""
        args = self.args
        return args.process_index - args.local_process_index if args.save_on_each_node else 0

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written."""
        return super()._get_output_dir(trial=trial) if self._saving_in is None else self._saving_in

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as TRL does; a checkpoint that cannot be finished is not there, older ones stay.

        Raises:
            DiskRefused: on every rank, if the disk of one of them failed; also that of the save before, if it was
                written beside the training.
        """
        self.finish_saving()
        run, step = self._get_output_dir(trial=trial), self.state.global_step
        target, beside, writer = Path(run, checkpoint_name(step)), self.saves_beside(), self._writer
        with ExitStack() as opened:
            save: Unfinished | None = None
            with agreeing(target):
                save = opened.enter_context(saving(run, step)) if self.args.should_save else None
            home = gather_objects(None if save is None else str(save.home))[writer] or ""
            with agreeing(target, Path(home)), self.kept_for_later(beside) as later:
                self._saving_in = home
                try:
                    self._write(model, trial)
                finally:
                    self._saving_in = None
                self._name_best(run, home, target.name)
                folder = Path(home, target.name)
                own = measure_own(folder, own_files(folder))
            found = gather_objects((writer, own))
            measured = {
                name: file for where, files in found if where == writer for name, file in files.items()
            }
            totals = self.totals()
            finish: Callable[[], None] = _nothing
            with agreeing(target, Path(home)):
                if save is not None:
                    finish = self._finishing(save, self._best(run), totals, later, measured, opened)
        self.start_saving(finish, target, beside=beside)
        if self.args.push_to_hub:
            with agreeing(target):
                self._push_from_checkpoint(str(target))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers'; it is uploaded when it is there, and not from where it is built."""
        if self._saving_in is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finishing(
        self, save: Unfinished, best: Best, totals: Totals, later: Writes, measured: Files, opened: ExitStack
    ) -> Callable[[], None]:
        """Write what a writer knows; what is left for it to do, perhaps in a thread, with what is ``opened``."""
        cursor = self._write_cursor(save.folder)
        self.write_record(save.folder, totals)
        about = {"cursor": cursor, "ranks": self.args.world_size, "epoch": self.state.epoch}
        return partial(self._finish, save, later, about, measured, best, opened.pop_all())

    def _write_cursor(self, folder: Path) -> dict[str, int] | None:
        """Write where the run stands in its rows, if it knows; what was written."""
        cursor = self.cursor()
        if cursor is None:
            return None
        cursor.write(folder)
        return asdict(cursor)

    def _finish(
        self,
        save: Unfinished,
        later: Writes,
        about: dict[str, Any],
        measured: Files,
        best: Best,
        opened: ExitStack,
    ) -> None:
        with opened:
            for write in later:
                write()
            publish(save, about, measured)
        say(f"Saved {save.target.name} in {self.args.output_dir}.")
        if best is not None and (save.run_folder / checkpoint_name(best[0])).is_dir():
            point(save.run_folder, BEST, best[0], metric=self.args.metric_for_best_model, value=best[1])
        retain(save.run_folder, self.args.save_total_limit)

    def _write(self, model: Any, trial: Any) -> None:
        """Let TRL write its files; the first failure is raised at the end, since ranks meet in between."""
        self._late = late = list[Exception]()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            late.append(error)
        finally:
            self._late = None
        if late:
            raise late[0]

    @contextmanager
    def _raised_late(self) -> Iterator[None]:
        """Keep an error of the block for the end of the checkpoint that is being written, if one is."""
        try:
            yield
        except Exception as error:
            if self._late is None:
                raise
            self._late.append(error)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's."""
        with self._raised_late():
            super().create_model_card(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """TRL's."""
        here = written_here() if self.args.should_save else nullcontext()
        with self._raised_late(), self._strategy.saving(self), here:
            super().save_model(*args, **kwargs)

    def _name_best(self, run: str, home: str, name: str) -> None:
        """The best checkpoint, if it is this one, by the name that it will have."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).parent != Path(home):
            return
        self.state.best_model_checkpoint = os.path.join(run, name)  # noqa: PTH118 (as transformers writes it)
        if self.args.should_save:
            self.state.save_to_json(str(Path(home, name, STATE)))

    def _best(self, run: str) -> Best:
        """Step and metric of the best checkpoint so far, if it is one of this run."""
        best = self.state.best_model_checkpoint
        step = None if best is None else step_of(Path(best).name)
        if best is None or step is None or Path(best).parent != Path(run):
            return None
        return step, self.state.best_metric

    @contextmanager
    def begun(self, resume: str | Path | bool | None) -> Iterator[str | bool | None]:
        """A block in which a run trains, on all ranks from one checkpoint, which is given.

        Args:
            resume: as for ``checkpoint_of``.

        Raises:
            CheckpointError: as there, or the run's strategy cannot go on with it.
            ConfigError: the strategy trains no more.
        """
        self._strategy.check_begin()
        checkpoint = self.checkpoint_of(resume)
        if isinstance(checkpoint, str):
            self._strategy.check_checkpoint(Path(checkpoint))
        with self.going_on(checkpoint):
            yield checkpoint

    def checkpoint_of(self, resume: str | Path | bool | None) -> str | bool | None:
        """The checkpoint that a run goes on with, the same on all ranks; what is damaged is passed over by name.

        Args:
            resume: a folder; True: the newest whole one of ``output_dir``; "auto": the same, or none where nothing was
                saved yet; None or False: none.

        Raises:
            CheckpointError: the folder is damaged or no checkpoint, or there is no whole one.
        """
        if not resume:
            return None
        found, said, is_damaged = self._found(resume)
        if resume in (True, AUTO):
            for line in said:
                say(line)
            if found is None and resume == AUTO and not is_damaged:
                return None  # an unfinished first save, at most
            if found is None and is_damaged:
                raise CheckpointError(
                    got=f"resume_from_checkpoint={resume!r} was given, and {self.args.output_dir} has no whole "
                    "checkpoint.",
                    need="A run goes on only with one whose files are what was saved. " + " ".join(said),
                    fix="Remove what is damaged and start anew, or give the folder of another run's checkpoint.",
                )
            if found is None:
                raise CheckpointError(
                    got=f"resume_from_checkpoint=True was given, and {self.args.output_dir} has no checkpoint.",
                    need="A run goes on with one that was saved in its output_dir.",
                    fix='Check output_dir, or write resume_from_checkpoint="auto", which begins where there is none.',
                )
            return found
        if said:
            older = "Take an older one" if is_damaged else "Give a folder such as outputs/checkpoint-100"
            raise CheckpointError(
                got=f"resume_from_checkpoint={str(resume)!r} was given. {' '.join(said)}",
                need="A run goes on only with a checkpoint whose files are what was saved.",
                fix=f"{older}, or resume_from_checkpoint=True for the newest that is whole.",
            )
        return str(resume)

    def _found(self, resume: str | Path | bool) -> _Looked:
        """What every rank finds for itself; machines with disks of their own take the newest that all of them have."""
        most = None
        while True:
            told = gather_objects(self._look_for(resume, most) if self.args.should_save else None)
            found = {rank: one for rank, one in enumerate(told) if one is not None}
            steps = [
                -1 if one.folder is None else step_of(Path(one.folder).name) or 0 for one in found.values()
            ]
            if resume not in (True, AUTO) or len(set(steps)) == 1:
                break
            most = min(steps)
        said = [f"Rank {rank}: {line}" if rank else line for rank, one in found.items() for line in one.said]
        return _Looked(found[self._writer].folder, said, any(one.is_damaged for one in found.values()))

    def _look_for(self, resume: str | Path | bool, most: int | None) -> _Looked:
        """On this rank's disk; of a run's checkpoints up to step ``most``, where others have no newer one."""
        if resume in (True, AUTO):
            choice = newest_whole(self.args.output_dir or ".", most=most)
            said = [str(one) for one in choice.passed_over]
            is_damaged = any(step_of(one.name) is not None for one in choice.passed_over)
            return _Looked(None if choice.folder is None else str(choice.folder), said, is_damaged)
        folder = Path(str(resume))
        said = problems(folder) if has_manifest(folder) else []
        if said:
            return _Looked(str(folder), said, True)
        none = why_none(folder)
        return _Looked(str(folder), [none] if none else [], False)


def _nothing() -> None:
    """What other ranks have to do to finish a checkpoint."""
