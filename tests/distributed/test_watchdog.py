"""A run that hangs ends with one report that names the rank and the line; one that is slow goes on. Real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pdb
import re
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import psutil
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainer,
    PantheraMLTrainingArguments,
    get_rank,
    setup_multi_gpu,
)
from pantheraml.config.multi_gpu_section import MultiGPUSettings
from pantheraml.distributed import hang_report, process_group, stacks
from pantheraml.distributed.activity import Activity
from pantheraml.distributed.heartbeats import Beat, Clock, Place
from pantheraml.distributed.watchdog import Watchdog
from pantheraml.errors import ConfigError
from tests.distributed import hanging
from tests.distributed.ranks import free_port
from tests.launch.test_agent import environment

SCRIPT = Path(hanging.__file__)
LINES = SCRIPT.read_text().splitlines()
HEAD = "PantheraML: the run hangs. "
ROWS = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(64)]})


def line_of(text):
    return 1 + next(number for number, line in enumerate(LINES) if text in line)


def forked(folder, ranks, function, *arguments):
    """Exit codes of ranks that run ``function``, and all that they wrote. They meet at the first of them."""
    context, port = multiprocessing.get_context("fork"), free_port()
    started = [
        context.Process(target=_rank, args=(folder, rank, ranks, port, function, arguments))
        for rank in range(ranks)
    ]
    for rank in started:
        rank.start()
    until = time.monotonic() + 60
    while any(_runs(rank.pid) for rank in started) and time.monotonic() < until:
        time.sleep(0.05)
    for rank in started:
        rank.kill()
        rank.join()
    logs = "".join((folder / f"log{rank}").read_text() for rank in range(ranks))
    return [rank.exitcode for rank in started], logs


def _rank(folder, rank, ranks, port, function, arguments):
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def nobody_is_left(folder):
    pids = [int(file.read_text()) for file in folder.iterdir() if file.name.startswith(("pid", "child"))]
    until = time.monotonic() + 3  # a child that was killed is waited for by whoever inherits it
    while any(_lives(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert pids and not [pid for pid in pids if _lives(pid)]


def _lives(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _runs(pid):
    return _lives(pid) and psutil.Process(pid).status() != psutil.STATUS_STOPPED


def one_head(told, folder, culprit, says):
    """The sentence of the only report, and the report, which is in the file, too."""
    assert told.count(HEAD) == 1, told
    head = told.split(HEAD)[1].splitlines()[0]
    assert re.match(rf"rank {culprit} of \d \(\S+, pid \d+\) has ", head), head
    assert "at step 4" in head and says in head
    report = (folder / "hang-report-step4.txt").read_text()
    assert report in told and report.startswith(head)
    return head, report


def test_a_rank_that_holds_pythons_lock(tmp_path):
    """It can tell nothing, nor hear a signal; the agent ends it."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "3", "locked", str(tmp_path), "1"], env=environment(), capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    err = done.stderr
    assert done.returncode == 124 and "done" not in done.stdout and "Traceback" not in err, err
    assert time.monotonic() - began < 60
    nobody_is_left(tmp_path)
    head, report = one_head(err, tmp_path, 2, "a call holds its Python lock")
    assert f"hanging.py:{line_of('lock is held')} " in head
    assert f"ranks 0, 1 wait in all_reduce ({SCRIPT}:{line_of('    all_reduce_scalar(1.0)')})" in head
    assert all(re.search(rf"^  {rank} +\S+ +\d+ +4 +computing ", report, re.MULTILINE) for rank in range(3))
    assert report.count("the thread that trains") == 2  # stacks that are alike are told once
    assert "gloo:all_reduce number 4" in report
    last = err.strip().splitlines()[-1]
    assert last.endswith("all ranks were ended.") and head.removesuffix(".") in last


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("skip", "hang(); rank 0 waits in all_reduce ("),
        ("stop1", "its process is stopped (SIGSTOP, or a debugger); rank 0 waits in all_reduce ("),
        ("raise", "failed with ValueError: this rank fails at step 4; rank 0 waits in all_reduce"),
    ],
)
def test_a_run_that_hangs_ends_with_one_report(tmp_path, how, says):
    codes, told = forked(tmp_path, 2, hanging.main, 2, how, tmp_path, 1.0)
    assert codes == [124, {"skip": 124, "stop1": -9, "raise": 1}[how]], told
    head, _ = one_head(told, tmp_path, 1, says)
    if how == "skip":  # what it has started ends with it
        assert f"called from hanging.py:{line_of('goes another way')} " in head
        assert (tmp_path / "child").exists()
    nobody_is_left(tmp_path)


def test_who_is_slow_goes_on(tmp_path):
    """A rank that sleeps a little longer than the limit after others that were slow, too, that computes in Python,
    and waits for a child that computes, for 4 times the limit; a save of twice the limit.

    No thread is left, and stopping takes no time.
    """
    codes, told = forked(tmp_path, 2, hanging.main, 2, "slow", tmp_path, 1.0)
    assert codes == [0, 0] and HEAD not in told, told
    for rank in range(2):
        assert f"rank {rank} done, [], True\n" in told
    assert not list(tmp_path.glob("hang*"))


def test_a_single_process_reports_and_goes_on(tmp_path):
    codes, told = forked(tmp_path, 1, hanging.main, 1, "sleep", tmp_path, 1.0)
    assert codes == [0] and "rank 0 done, [], True" in told, told
    assert told.count(HEAD) == 1 and f"hanging.py:{line_of('the row never comes')} rows()" in told
    assert "this process (" in told and (tmp_path / "hang-report-step4.txt").exists()


# --- the trainer ----------------------------------------------------------------------------------------------


def train(folder, output, hang_seconds, sleepers, seconds, rows, kind=PantheraMLDistributedTrainer):
    """A trainer of which ranks sleep after step 3, each in a method of its own."""
    setup_multi_gpu(MultiGPUConfig(hang_seconds=hang_seconds))
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", kernels="off"
    )
    between = "no" if "get_batch_samples" in sleepers else "steps"
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, max_steps=5, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy=between, save_steps=3, eval_steps=3, eval_strategy=between,
    )  # fmt: skip
    trainer = kind(model, args, train_dataset=rows, eval_dataset=ROWS.select(range(2)), tokenizer=tokenizer)

    def sleep(rank):
        if get_rank() == rank and trainer.state.global_step == 3:
            time.sleep(seconds)

    for name, rank in sleepers.items():
        if name == "collate":
            trainer.data_collator = before(trainer.data_collator, partial(sleep, rank))
        elif name == "on_log":
            trainer.callback_handler.add_callback(SlowLog(partial(sleep, rank)))
        else:
            setattr(trainer, name, before(getattr(trainer, name), partial(sleep, rank)))
    trainer.train()
    assert trainer.state.global_step == 5 and "call_event" not in vars(trainer.callback_handler)


def before(original, first):
    def late(*arguments, **more):
        first()
        return original(*arguments, **more)

    return late


class SlowLog(TrainerCallback):
    def __init__(self, sleep):
        self.sleep = sleep

    def on_log(self, *_, **__):
        self.sleep()


@pytest.mark.parametrize("kind", [PantheraMLDistributedTrainer, PantheraMLTrainer])
def test_a_data_loader_that_hangs(llama, tmp_path, kind):
    codes, told = forked(tmp_path, 2, train, llama, tmp_path, 1, {"get_batch_samples": 1}, 1000, ROWS, kind)
    assert codes == [124, 124], told
    head, _ = one_head(told, tmp_path, 1, "test_watchdog.py")
    assert " sleep()" in head and "rank 0 waits in " in head


@pytest.mark.parametrize("hang_seconds", [1, 0])
def test_slow_saves_evaluations_callbacks_and_streams(llama, tmp_path, hang_seconds):
    """More than the limit each; one rank waits for a stream's rows. 0 is no watchdog: a step may take as long."""
    sleepers = {"_save": 0, "evaluation_loop": 1, "on_log": 0, "collate": 1}
    if not hang_seconds:
        sleepers = {"get_batch_samples": 1}
    rows = ROWS.to_iterable_dataset() if hang_seconds else ROWS
    codes, told = forked(tmp_path, 2, train, llama, tmp_path, hang_seconds, sleepers, 1.6, rows)
    assert codes == [0, 0] and HEAD not in told, told
    assert not list(tmp_path.glob("hang*"))


# --- parts ----------------------------------------------------------------------------------------------------


def test_hang_seconds():
    assert MultiGPUConfig().hang_seconds == MultiGPUSettings().to_config().hang_seconds == 50
    assert MultiGPUConfig(hang_seconds=0).hang_seconds == 0
    assert MultiGPUConfig(hang_seconds=None).hang_seconds is None
    for wrong in (-1, True, False, "60"):
        with pytest.raises(ConfigError, match=r"hang_seconds.*a number of 0 or more"):
            MultiGPUConfig(hang_seconds=wrong)


def test_the_settings_of_a_run_are_those_of_its_trainers(monkeypatch):
    monkeypatch.setattr(process_group, "_settings", MultiGPUConfig())
    process_group.setup_multi_gpu(MultiGPUConfig(num_processes=1, hang_seconds=7))
    process_group.setup_multi_gpu()
    assert process_group.settings_of_run().hang_seconds == 7


def test_limits():
    """Of first steps, steps, and what is done in patience; the longest step counts three times."""
    dog = Watchdog(50, 1800, Path())
    clock = dog._clock = FixedClock()
    found = []
    for seconds, step, phase in [
        (0, 1, "computing"), (100, 2, "between steps"), (1, 2, "rewards"), (40, 3, "computing"), (9, 4, "computing"),
    ]:  # fmt: skip
        clock.seconds += seconds
        dog.progress(step, phase, "alone" if phase == "rewards" else "step")
        found.append(round(dog.limit()))
    clock.seconds += 500
    with dog.patient("saving"):
        found.append(dog.limit())
        dog.progress(5, "computing")
        found.append(dog.limit())
        assert dog._mark.phase == "saving"
    # Step 4's computing took 500 s until the save began.
    assert found == [600, 300, 300, 120, 120, 1800, 1800] and dog.limit() == 1500
    dog.progress(5, "generating", "token")
    clock.seconds += 900  # it waits for the others
    dog.progress(5, "computing")
    assert dog.limit() == 1500
    dog.progress(6, "reading the first rows", "first")
    assert dog.limit() == 600
    dog = Watchdog(50, 1800, Path())
    dog.resumed = True
    dog.progress(8, "computing")
    assert dog.limit() == 1800


def test_a_step_with_more_to_compute_than_any_before_has_more_time():
    dog = Watchdog(50, 1800, Path())
    clock = dog._clock = FixedClock()
    limits = []
    for step, work in enumerate([100, 400, 200, 800, 800, 10**6, 800], 1):
        clock.seconds += 30
        dog.begins(work)
        dog.progress(step, "computing")
        limits.append(dog.limit())
    assert limits == [600, 360, 90, 180, 90, 1800, 90]


class FixedClock(Clock):
    seconds = 0.0

    def now(self):
        return self.seconds


def test_a_clock_stands_still_while_its_process_does():
    clock = Clock()
    before = clock.now()
    clock._last -= 100  # as if nobody had called it for so long
    clock.tick(1.0, slack=5.0)
    assert clock.now() - before < -90  # what was measured before is no older than it was


def findings(*frames, flights=None, **marks):
    text = "Thread 0x0000000000000001 (most recent call first):\n"
    return [
        hang_report.Finding(
            rank, Beat(Place("host", 10 + rank, 1, ""), 1, 17, "computing", marks.get(f"marks{rank}", 5)), 63.0, None,
            hang_report.Stacks(
                text + "".join(f'  File "{file}", line {line} in {name}\n' for file, line, name in one),
                flight="" if flights is None else json.dumps({"entries": flights[rank]}),
            ),
        )
        for rank, one in enumerate(frames)
    ]  # fmt: skip


def test_ranks_that_wait_for_one_another():
    torch_frame = ("/x/torch/distributed/distributed_c10d.py", 1, "broadcast")
    one, other = (torch_frame, ("a.py", 3, "f")), (torch_frame, ("a.py", 9, "g"))
    said = hang_report.sentence(findings(one, other, one))
    assert said == (
        "rank 1 of 3 (host, pid 11) has not moved for 63 s at step 17: it waits in broadcast (a.py:9); "
        "ranks 0, 2 wait in broadcast (a.py:3)"
    )
    both = hang_report.sentence(findings(one, other))
    assert "rank 0 of 2" in both and "rank 1 of 2" in both and "a.py:3" in both and "a.py:9" in both


def test_ranks_that_wait_for_a_gpu():
    """They are in no call that could be seen: who has asked for fewer collectives is to blame, or who said less."""

    def nccl(number, state):
        return dict(
            profiling_name="nccl:all_reduce", collective_seq_id=number, process_group=["0", "default_pg"],
            input_sizes=[[8]], state=state,
        )  # fmt: skip

    item, loader = (("trainer.py", 7, "norm"),), (("data.py", 5, "read"),)
    flights = [[nccl(6, "completed"), nccl(7, "started")], [nccl(6, "completed")]]
    said = hang_report.sentence(findings(item, loader, flights=flights))
    assert said.startswith("rank 1 of 2") and "it is in data.py:5 read(); " in said
    assert said.endswith(
        "rank 0 waits in trainer.py:7 norm() for the GPU, which is in nccl:all_reduce number 7"
    )
    assert "nccl:all_reduce number 7 of group 0/default_pg, of sizes [[8]]: started" in hang_report.report(
        findings(item, loader, flights=flights), 50
    )
    assert [one.rank for one in hang_report.blamed(findings(item, loader, item, marks1=4))] == [1]


def test_stacks_as_faulthandler_writes_them():
    text = (
        'Thread 0x00000000000000ff [main] (most recent call first):\n  File "/a b/c.py", line 7 in f\n\n'
        'Current thread 0x0000000000000001 (most recent call first):\n  File "x.py", line 1 in <module>\n'
    )
    first, second = stacks.parse(text, trains=0xFF)
    assert first.trains and first.frames == (("/a b/c.py", 7, "f"),) and not second.trains


def test_a_debuggers_prompt_is_no_hang(monkeypatch):
    seen = []
    activity = Activity(threading.get_ident())

    def prompt(_):
        seen.append(activity.is_debugged())
        return "continue"

    monkeypatch.setattr("builtins.input", prompt)
    debugger = pdb.Pdb(nosigint=True, readrc=False)
    debugger.use_rawinput = True
    debugger.set_trace()
    assert seen == [True] and not activity.is_debugged()


def test_a_word_of_the_training_thread_costs_nothing():
    dog = Watchdog(50, 1800, Path())
    began = time.perf_counter()
    for step in range(10_000):
        dog.progress(step, "computing")
    assert (time.perf_counter() - began) / 10_000 < 50e-6
