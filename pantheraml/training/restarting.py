"""A run whose ranks were started again goes on by itself, with the last whole checkpoint that it has saved.

What was in the output folder before the run is another run's: rank 0 writes that down for its agent when training
begins, together with the number of rows of a step, which is the run's, however many ranks it is continued on.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pantheraml.checkpoint.names import MANIFEST, checkpoints
from pantheraml.checkpoint.resuming import STATE, choose, damage
from pantheraml.checkpoint.unfinished import recover
from pantheraml.distributed.process_group import broadcast_object
from pantheraml.launch.environment import AGENT
from pantheraml.launch.ranks import own_record
from pantheraml.log import say
from pantheraml.training.checkpoints import WholeCheckpoints

# Set by torch elastic's agent for its ranks.
_MOST, _NUMBER = "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"


class StepsDone(TrainerCallback):
    """Tells the agent of this machine which step is done, so that it can say so when this process dies."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Training begins, or goes on."""
        record = own_record()
        if record is not None:
            record.begin(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A step is done."""
        record = own_record()
        if record is not None:
            record.done(state.global_step)


class RestartedRuns(WholeCheckpoints):
    """The part of the trainer that goes on after its ranks were started again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(StepsDone())

    def checkpoint_of(self, resume: str | Path | bool | None) -> str | bool | None:
        """The checkpoint that a run goes on with: its own last one, if its ranks were started again."""
        if AGENT not in os.environ or os.environ.get(_MOST, "0") == "0":
            return super().checkpoint_of(resume)
        begun, own = broadcast_object(self._begun() if self.is_world_process_zero() else None) or (None, None)
        if begun is None:
            return super().checkpoint_of(resume)
        self.take_rows(begun)
        if own is not None:
            say(f"the ranks were started again: going on with {Path(own).name}.")
            return own
        say("the ranks were started again, and this run has saved no whole checkpoint: it begins again.")
        return super().checkpoint_of(resume)

    def _begun(self) -> tuple[int, str | None] | None:
        """Rows of a step and the checkpoint of what ranks before these began; None if this is the beginning."""
        run = Path(self.args.output_dir or ".").resolve()
        note = Path(os.environ[AGENT], f"run_{hashlib.sha256(str(run).encode()).hexdigest()[:16]}.json")
        if os.environ.get(_NUMBER, "0") == "0" or not note.exists():
            before = {folder.name: _identity(folder) for folder in checkpoints(run)}
            rows = self.get_total_train_batch_size(self.args)
            note.write_text(json.dumps({"rows": rows, "checkpoints": before}))
            return None
        begun = json.loads(note.read_text())
        theirs = begun["checkpoints"]

        def judge(folder: Path) -> list[str]:
            is_theirs = theirs.get(folder.name) == _identity(folder)
            return ["It is an earlier run's."] if is_theirs else damage(folder)

        recover(run)
        choice = choose(run, judge)
        for one in choice.passed_over:
            say(f"{one}")
        return begun["rows"], None if choice.folder is None else str(choice.folder)


def _identity(folder: Path) -> list[int]:
    """Numbers that another checkpoint of this name would not have."""
    for name in (MANIFEST, STATE, "."):
        file = folder / name
        if file.exists():
            return [file.stat().st_ino, file.stat().st_mtime_ns]
    return []
