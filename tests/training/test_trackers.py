"""A tracker that is down stops no training, and gets what it missed when it is back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from pantheraml.training.trackers import GuardedTracker, TrackerGuard
from tests.training.test_checkpoints import build, folder  # noqa: F401


class Down(TensorBoardCallback):
    """A tracker of transformers' whose service answers nothing."""

    def __init__(self):
        self.tried = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.fail("on_train_begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.fail("on_log")

    def on_train_end(self, args, state, control, **kwargs):
        self.fail("on_train_end")

    def fail(self, event):
        self.tried.append(event)
        raise ConnectionError(f"no route to the tracker\nfrom {event}")


def test_training_goes_on(folder, tmp_path, caplog):  # noqa: F811
    trainer = build(folder, tmp_path, save_strategy="no")
    early, late = Down(), Down()
    trainer.callback_handler.add_callback(early)
    trainer._trackers.cover(trainer.callback_handler)
    trainer.add_callback(late)
    with caplog.at_level("INFO", "pantheraml"):
        trainer.train()
    assert trainer.state.global_step == 6
    for tracker in (early, late):
        assert tracker.tried == ["on_train_begin", "on_log", "on_train_end"], (
            "once, and again when the run ends"
        )
    said = [record.getMessage() for record in caplog.records if "Down failed" in record.getMessage()]
    assert len(said) == 4, said
    assert said[0].startswith(
        "Down failed (ConnectionError: no route to the tracker). Training goes on; log lines wait"
    )
    assert said[-1].endswith("at the end of the run; 7 log lines did not get there.")


def test_other_callbacks_fail_as_ever(folder, tmp_path):  # noqa: F811
    class Own(TrainerCallback):
        def on_log(self, *_, **__):
            raise ConnectionError("the user's own")

    trainer = build(folder, tmp_path, save_strategy="no")
    trainer.add_callback(Own())
    with pytest.raises(ConnectionError, match="the user's own"):
        trainer.train()


class Service:
    """A tracker, its clock, and what reached it."""

    def __init__(self):
        self.now, self.works, self.takes, self.got = 0.0, True, 0.0, []
        self.guard = GuardedTracker("Service", lambda: self.now)

    def on_log(self, args, state, control, logs=None, **details):
        self.now += self.takes
        if not self.works:
            raise TimeoutError
        self.got.append((state.global_step, logs["loss"]))

    def log(self, step):
        state, logs = self.state, {"loss": float(step)}
        state.global_step = step
        self.guard.call(self.on_log, "on_log", None, state, None, logs=logs)
        logs["loss"] = None  # whoever logs may change it afterwards

    state = TrainerState()


def test_what_it_missed_is_sent_later(caplog):
    service = Service()
    service.log(1)
    service.works = False
    with caplog.at_level("INFO", "pantheraml"):
        tried = []
        for step in range(2, 1000):
            before = len(caplog.records)
            service.now += 10
            service.log(step)
            tried += [service.now] * (len(caplog.records) - before)
        assert [after - before for before, after in pairwise(tried)] == [
            60, 120, 240, 480, 960, 1920, 3600,
        ]  # fmt: skip
        service.works = True
        service.now += 3600
        service.log(1000)
    assert service.got == [(step, float(step)) for step in range(1, 1001)]
    assert "Service is back" in caplog.records[-1].getMessage()
    service.works = False
    service.log(1001)
    service.works, service.now = True, service.now + 59
    service.log(1002)
    assert len(service.got) == 1000, "it is left alone for a minute again, as at first"


def test_a_slow_one_is_left_alone_too(caplog):
    service = Service()
    service.takes = 31.0
    with caplog.at_level("INFO", "pantheraml"):
        service.log(1)
        service.log(2)
    assert service.got == [(1, 1.0)] and "Service took 31 s. Training" in caplog.text
    service.now, service.takes = service.now + 60, 0.0
    service.log(3)
    assert [step for step, _ in service.got] == [1, 2, 3]


def test_methods_are_given_back():
    tracker = Down()
    guard = TrackerGuard()
    guard.cover(CallbackHandler([tracker], None, None, None, None))
    tracker.on_log(None, TrainerState(), None, logs={})
    assert guard.patches.revert() is None
    with pytest.raises(ConnectionError):
        tracker.on_log(None, TrainerState(), None, logs={})
