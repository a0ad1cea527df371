"""A run begins, or goes on where a checkpoint stands: what each part of a trainer that keeps some of it adds to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer

from pantheraml.checkpoint.cursor import Cursor
from pantheraml.errors import ConfigError


class ContinuedRun(Trainer):
    """The part of the trainer below all that go on: nothing is kept here, and transformers counts the steps."""

    @contextmanager
    def going_on(self, resume: str | bool | None) -> Iterator[None]:
        """A block in which a run trains.

        Args:
            resume: the folder of the checkpoint that it goes on with; without one the run is a new one.
        """
        del resume
        yield

    def cursor(self) -> Cursor | None:
        """Where the run stands in its rows; None where steps alone are counted."""
        return None

    def take_rows(self, rows: int) -> None:
        """Let a step have as many rows as it had on the ranks before these.

        Raises:
            ConfigError: it has others here.
        """
        here = self.get_total_train_batch_size(self.args)
        if here != rows:
            raise ConfigError(
                got=f"The ranks were started again, and {here} rows are a step of {self.args.world_size} of them.",
                need=f"It had {rows} before, and a run that goes on takes steps of as many.",
                fix="Pass num_processes, so that as many ranks are started.",
            )
