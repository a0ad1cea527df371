"""What a trainer tells its watchdog: a word before and after the callbacks of every event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.process_group import connect_store, get_rank, group_size
from pantheraml.distributed.watchdog import Watchdog

# What is done after an event; what follows the others is what was done before them.
_NEXT = {
    "on_train_begin": "between steps",
    "on_epoch_begin": "between steps",
    "on_step_begin": "computing",
    "on_step_end": "between steps",
    "on_epoch_end": "between epochs",
    "on_train_end": "ending",
}
_EVENTS = (
    *_NEXT,
    "on_substep_end",
    "on_optimizer_step",
    "on_prediction_step",
    "on_log",
    "on_save",
    "on_evaluate",
)


class _Phase:
    """Where training stands, for the two callbacks."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog, self.name = watchdog, "starting"


class _BeforeOthers(TrainerCallback):
    """The first callback: those of others may take their time."""

    def __init__(self, phase: _Phase) -> None:
        self._phase = phase

    def tell(self, event: str, state: TrainerState) -> None:
        """An event begins."""
        self._phase.watchdog.progress(state.global_step + (event != "on_step_end"), "callbacks")


class _AfterOthers(_BeforeOthers):
    """The last callback: training goes on."""

    def tell(self, event: str, state: TrainerState) -> None:
        """An event is over."""
        self._phase.name = _NEXT.get(event, self._phase.name)
        self._phase.watchdog.progress(state.global_step + 1, self._phase.name)


def _listener(event: str) -> Any:
    def listen(
        self: _BeforeOthers, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.tell(event, state)

    return listen


for _event in _EVENTS:
    setattr(_BeforeOthers, _event, _listener(_event))


@contextmanager
def watched(trainer: Trainer, config: MultiGPUConfig, resumed: bool) -> Iterator[Watchdog | None]:
    """A watchdog for a block in which ``trainer`` trains; None where the settings want none.

    Args:
        trainer: what tells its progress.
        config: its ``hang_seconds`` and ``timeout_minutes`` count.
        resumed: whether rows are skipped before the first step.
    """
    name = f"watch_{next(_runs)}"
    if not config.hang_seconds:
        yield None
        return
    watchdog = Watchdog(
        config.hang_seconds,
        60 * config.timeout_minutes,
        Path(trainer.args.output_dir or "outputs"),
        rank=get_rank() if group_size() > 1 else 0,
        world_size=group_size(),
        connect=connect_store,
        name=name,
        resumed=resumed,
    )
    phase, callbacks = _Phase(watchdog), trainer.callback_handler.callbacks
    before, after = _BeforeOthers(phase), _AfterOthers(phase)
    callbacks.insert(0, before)
    callbacks.append(after)
    watchdog.start()
    error: BaseException | None = None
    try:
        yield watchdog
    except BaseException as failure:
        error = failure
        raise
    finally:
        watchdog.stop(error)
        for mine in (before, after):
            callbacks.remove(mine)


def patience(watchdog: Watchdog | None, phase: str) -> AbstractContextManager[None]:
    """``watchdog.patient(phase)``, if there is one."""
    return nullcontext() if watchdog is None else watchdog.patient(phase)


# Trainers train in the same order on all ranks.
_runs = count()
