"""A run that is asked to stop saves and ends: real processes, forked after the imports, and real signals."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from transformers import TrainerCallback

from pantheraml.checkpoint.manifest import problems, read_manifest
from pantheraml.checkpoint.pointers import read_pointer
from pantheraml.errors import CheckpointError, RunStopped
from pantheraml.training.stop_signals import StopSignals
from tests.distributed.ranks import run_ranks
from tests.training.test_checkpoints import build, flip, folder, losses  # noqa: F401 (a fixture)

INTERRUPTED = 9  # exit code of a child that caught KeyboardInterrupt


class Pause(TrainerCallback):
    """Says, once, that a moment has come, and waits until it was answered."""

    def __init__(self, place: Path, event: str, step: int = 3):
        self.place, self.step = place, step
        setattr(self, event, self.pause)

    def pause(self, args, state, control, **_):
        if state.global_step == self.step and not (self.place / "here").exists():
            (self.place / "here").touch()
            wait_for(self.place / "answered")
            time.sleep(0.5)  # signals are noted at once, and taken up by a thread


def wait_for(path: Path) -> None:
    end = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.01)


def in_a_child(action, answer, place: Path) -> int:
    """Exit code of a forked process in a group of its own, negative for a signal; ``answer(pid)`` when it pauses."""
    place.mkdir()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            action()
            code = 0
        except KeyboardInterrupt as end:
            code = INTERRUPTED
            (place / "ended").write_text(str(end))
        except SystemExit as end:
            code = end.code
            (place / "ended").write_text(str(end))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    wait_for(place / "here")
    answer(child)
    (place / "answered").touch()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(model, output, pause=None, resume=None, after=lambda trainer: None, **settings):
    trainer = build(model, output, **{**dict(save_strategy="no", max_steps=8), **settings})
    if pause is not None:
        trainer.add_callback(pause)
    trainer.train(resume_from_checkpoint=resume)
    after(trainer)
    return losses(trainer)


def asked(model, tmp_path, answer, event="on_step_end", **settings):
    """Exit code and output folder of a run that is answered when it pauses, within step 3."""
    output, place = tmp_path / "run", tmp_path / "place"
    pause = Pause(place, event, settings.pop("at", 3))
    return in_a_child(lambda: train(model, output, pause, **settings), answer, place), output


def send(*numbers):
    return lambda pid: [os.kill(pid, number) for number in numbers]


def checkpoints(output):
    found = sorted(path.name for path in output.glob("checkpoint-*"))
    assert not any(problems(output / name) for name in found)
    return found


def ended(tmp_path):
    return (tmp_path / "place" / "ended").read_text()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):  # noqa: F811
    return train(folder, tmp_path_factory.mktemp("whole"))


def test_sigterm_saves_and_ends_and_the_run_goes_on(folder, tmp_path, whole):  # noqa: F811
    """Its rows are read by a worker that gets the signal too, as under SLURM or torchrun."""
    code, output = asked(
        folder, tmp_path, lambda pid: os.killpg(pid, signal.SIGTERM), dataloader_num_workers=1
    )
    assert code == 128 + signal.SIGTERM
    assert checkpoints(output) == ["checkpoint-3"] and read_pointer(output, "latest").step == 3
    assert read_manifest(output / "checkpoint-3").about["cursor"]["rows"] == 6
    assert ended(tmp_path) == (
        f"SIGTERM: stopped after step 3 of 8, saved in {output / 'checkpoint-3'}; "
        "trainer.train(resume_from_checkpoint=True) goes on."
    )
    assert train(folder, output, resume="auto", dataloader_num_workers=1) == whole, "bit by bit"


def test_schedulers_may_repeat_themselves(folder, tmp_path):  # noqa: F811
    code, output = asked(folder, tmp_path, send(signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM))
    assert code == 128 + signal.SIGUSR1 and checkpoints(output) == ["checkpoint-3"]


def test_ctrl_c_saves(folder, tmp_path):  # noqa: F811
    """At once where an evaluation is under way, after the step that came before it."""
    settings = dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=1)
    code, output = asked(folder, tmp_path, send(signal.SIGINT), "on_prediction_step", **settings)
    assert code == INTERRUPTED and "SIGINT: stopped after step 3 of 8" in ended(tmp_path)
    assert checkpoints(output) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3], "no evaluation"


def test_ctrl_c_twice_ends_at_once(folder, tmp_path):  # noqa: F811
    code, output = asked(folder, tmp_path, lambda pid: (send(2)(pid), time.sleep(0.2), send(2)(pid)))
    assert code == INTERRUPTED and checkpoints(output) == [] and ended(tmp_path) == ""


def test_before_the_first_step_there_is_nothing_to_save(folder, tmp_path):  # noqa: F811
    code, output = asked(folder, tmp_path, send(signal.SIGTERM), "on_step_begin", at=0)
    assert code == -signal.SIGTERM and checkpoints(output) == []


def test_files_ask_as_well(folder, tmp_path):  # noqa: F811
    """SAVE, and then STOP, each of which is taken away and obeyed once."""
    output = tmp_path / "run"

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            time.sleep(0.02)

        def on_save(self, args, state, control, **_):
            if not control.should_training_stop and len(checkpoints(output)) == 1:
                (output / "STOP").touch()

    def action():
        trainer = build(folder, output, save_strategy="no", max_steps=1000)
        trainer.add_callback(Slow)
        trainer.add_callback(Pause(tmp_path / "place", "on_step_end", 2))
        trainer.train()

    code = in_a_child(action, lambda _: (output / "SAVE").touch(), tmp_path / "place")
    assert code == 75 and ended(tmp_path).startswith("STOP: stopped after step ")
    assert len(checkpoints(output)) == 2 and not (output / "STOP").exists() and not (output / "SAVE").exists()


def test_a_training_that_is_done_is_not_stopped(folder, tmp_path):  # noqa: F811
    """Nor does it take another step when it is gone on with."""
    output, place = tmp_path / "run", tmp_path / "place"
    pause = Pause(place, "on_train_end", 8)
    settings = dict(save_strategy="steps", save_steps=8)

    def action():
        train(folder, output, pause, after=lambda _: (place / "went on").touch(), **settings)
        trainer = build(folder, output, **settings, max_steps=8)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 8

    assert in_a_child(action, send(signal.SIGTERM), place) == 0
    assert (place / "went on").exists() and checkpoints(output) == ["checkpoint-8"]


def on_ranks(model, output, resume=None):
    """Code and step of a rank; the second one alone is sent a signal."""

    class Sent(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3 and os.environ["RANK"] == "1" and resume is None:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.5)

    trainer = build(model, output, save_strategy="no", max_steps=8, per_device_train_batch_size=1)
    trainer.add_callback(Sent)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RunStopped as stopped:
        return stopped.code, trainer.state.global_step
    return losses(trainer)


def test_ranks_stop_together(folder, tmp_path, whole):  # noqa: F811
    found = run_ranks(2, on_ranks, folder, tmp_path)
    step = found[0][1]
    assert found == [(138, step)] * 2 and step in (3, 4), "as soon as both can"
    assert checkpoints(tmp_path) == [f"checkpoint-{step}"]
    for mine in run_ranks(2, on_ranks, folder, tmp_path, "auto"):
        assert mine == {number: pytest.approx(loss, rel=2e-6) for number, loss in whole.items()}


def test_auto_goes_on_with_nothing_but_a_whole_one(folder, tmp_path):  # noqa: F811
    (tmp_path / ".unfinished-checkpoint-2-ab12cd34" / "checkpoint-2").mkdir(parents=True)
    trainer = build(folder, tmp_path, max_steps=2)
    assert trainer.checkpoint_of("auto") is None, "what a killed first save leaves"
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.checkpoint_of("auto") == str(tmp_path / "checkpoint-2")
    flip(tmp_path / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(CheckpointError, match="resume_from_checkpoint='auto' was given"):
        trainer.checkpoint_of("auto")


def test_signals_of_others_are_left_alone():
    """Those for which a program has its own handler, and all that its own processes get."""
    heard, before = [], {number: signal.getsignal(number) for number in (2, 10, 15)}
    signals = StopSignals()
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        signals.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [1] and signals.heard is None
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.heard == signal.SIGTERM
    finally:
        signals.close()
        signal.signal(signal.SIGUSR1, before[10])
    assert {number: signal.getsignal(number) for number in (2, 10, 15)} == before
