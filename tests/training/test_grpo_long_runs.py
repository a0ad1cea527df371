"""A long run of GRPO on two ranks: it saves whole checkpoints, stops when it is asked, and does not hang for ever."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import wraps
from pathlib import Path

import psutil
import pytest
from transformers import TrainerCallback

from pantheraml import MultiGPUConfig, barrier, get_rank
from pantheraml.checkpoint.inspection import inspect_checkpoint
from pantheraml.checkpoint.manifest import problems, read_manifest
from pantheraml.checkpoint.pointers import read_pointer
from pantheraml.checkpoint.run_record import read_totals
from pantheraml.errors import RunStopped
from pantheraml.launch.environment import AGENT
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_full_disk import Full
from tests.distributed.test_watchdog import forked, one_head
from tests.training.grpo_runs import build, lengths, vowels
from tests.training.test_checkpoints import flip, names

SETTINGS = dict(
    per_device_train_batch_size=4, per_device_eval_batch_size=6, save_strategy="steps", save_steps=2, beta=0.04,
    max_steps=5, dataloader_num_workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


class At:
    """A reward that does something once on one rank, in the middle of a step, and is worth what ``lengths`` is."""

    __name__ = "lengths"

    def __init__(self, rank, step, action):
        self.rank, self.step, self.action = rank, step, action

    def __call__(self, *args, trainer_state, **columns):
        if get_rank() == self.rank and trainer_state.global_step + 1 == self.step:
            self.action()
        return lengths(**columns)


def be_asked():
    for asked in (*psutil.Process().children(), psutil.Process()):  # as schedulers do, who reads rows as well
        asked.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # a thread takes it up


class Began(TrainerCallback):
    """At which step a run began."""

    def on_train_begin(self, args, state, control, **_):
        self.step = state.global_step


def told(trainer):
    """Every figure of each step that tells one training from another."""
    names = ("loss", "grad_norm", "reward", "kl", "num_tokens")
    return {
        line["step"]: [line[name] for name in names] for line in trainer.state.log_history if "loss" in line
    }


def train(folder, output, resume=None, reward=lengths, callbacks=()):
    """The figures of the steps of a run, how it ended, its last completions, and the step at which it began."""
    began = Began()
    trainer = build(
        folder, output, rewards=(vowels, reward), callbacks=[began, *callbacks], config=MultiGPUConfig(),
        **SETTINGS,
    )  # fmt: skip
    ended = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RunStopped as stopped:
        ended = stopped.code, str(stopped)
    return told(trainer), ended, list(trainer._logs["completion"]), began.step


def long_runs(folder, output):
    found = {"whole": train(folder, output / "whole")}
    again, agent = output / "again", {AGENT: str(output), "TORCHELASTIC_MAX_RESTARTS": "1"}
    os.environ.update(agent, TORCHELASTIC_RESTART_COUNT="0")
    found["stopped"] = train(folder, again, reward=At(1, 3, be_asked))
    os.environ.update(TORCHELASTIC_RESTART_COUNT="1")
    found["started again"] = train(folder, again)
    for name in (*agent, "TORCHELASTIC_RESTART_COUNT"):
        del os.environ[name]
    for resume in ("auto", True):
        if get_rank() == 0:
            for step in (4, 5):
                flip(again / f"checkpoint-{step}/optimizer.pt")
        barrier()
        found[resume] = train(folder, again, resume=resume)
    full = Full(1, (1, 3))
    found["full"] = train(folder, output / "full", callbacks=[full])
    return {**found, "saved": full.saved}


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks")
    return output, run_ranks(2, long_runs, folder, output)


def test_checkpoints_are_whole_and_say_what_the_run_came_to(ranks):
    output, found = ranks
    assert names(output / "whole") == ["checkpoint-2", "checkpoint-4", "checkpoint-5", "latest.json"]
    for step in (2, 4, 5):
        checkpoint = output / f"whole/checkpoint-{step}"
        inspection = inspect_checkpoint(checkpoint, load=True)
        assert inspection.findings and not inspection.num_wrong, inspection
        assert {"rng_state_0.pth", "rng_state_1.pth", "run.json"} <= set(read_manifest(checkpoint).files)
        assert read_totals(checkpoint).tokens == found[0]["whole"][0][step][-1] > 0
    assert read_pointer(output / "whole", "latest").step == 5


def test_a_run_that_is_asked_within_a_step_saves_and_ends_and_goes_on_bit_by_bit(ranks):
    output, found = ranks
    for rank in found:
        before, (code, said), *_ = rank["stopped"]
        assert code == 143 and said.startswith("SIGTERM: stopped after step 3 of 5, saved in ")
        assert list(before) == [1, 2, 3], "the step at hand is done"
        steps, ended, completions, _ = rank["whole"]
        assert ended is None and list(steps) == [1, 2, 3, 4, 5] and before == {n: steps[n] for n in before}
        for again in ("started again", "auto", True):
            assert rank[again] == (steps, None, completions, 3)
    assert read_pointer(output / "again", "latest").step == 5
    assert not any(problems(output / f"again/checkpoint-{step}") for step in (2, 3, 4, 5)), "written anew"


def test_a_disk_that_takes_no_checkpoint_does_not_end_the_run(ranks):
    output, found = ranks
    for rank in found:
        assert rank["full"] == rank["whole"] and rank["saved"] == [4, 5]
    assert names(output / "full") == ["checkpoint-4", "checkpoint-5", "latest.json"]


def watched(folder, output):
    """Rank 1 is slow with its tokens at step 3, for longer than the limit, and its reward never comes at step 4."""
    trainer = build(
        folder, output, rewards=[vowels, At(1, 4, sleeps)], config=MultiGPUConfig(hang_seconds=1), **SETTINGS
    )  # fmt: skip
    base = trainer._base()
    prepare = base.prepare_inputs_for_generation

    @wraps(prepare)
    def slowly(*args, **kwargs):
        if get_rank() == 1 and trainer.state.global_step == 2:
            time.sleep(0.25)
        return prepare(*args, **kwargs)

    base.prepare_inputs_for_generation = slowly
    trainer.train()


def sleeps():
    time.sleep(1000)  # the judge does not answer


def test_a_reward_that_never_comes_is_named_and_slow_tokens_are_no_hang(folder, tmp_path):
    codes, said = forked(tmp_path, 2, watched, folder, tmp_path)
    assert codes == [124, 124], said
    head, report = one_head(said, tmp_path, 1, "test_grpo_long_runs.py")
    line = 1 + next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines()) if "# the judge" in text
    )
    assert f"test_grpo_long_runs.py:{line} sleeps()" in head and "rank 0 waits in " in head
    assert re.search(r"^  1 +\S+ +\d+ +4 +computing rewards ", report, re.MULTILINE), report
