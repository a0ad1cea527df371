"""A run that hangs ends with one report that names the rank and the line; one that is slow goes on. Real processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
from datasets import Dataset

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    get_rank,
)
from pantheraml.config.multi_gpu_section import MultiGPUSettings
from pantheraml.distributed import hang_report, process_group, stacks
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


def hang(folder, how, ranks):
    """Exit code, standard output and standard error of plain python, which starts the ranks."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(ranks), how, str(folder), "1"], env=environment(),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    nobody_is_left(folder)
    return done.returncode, done.stdout, done.stderr


def forked(folder, ranks, function, *arguments):
    """Exit codes of ranks that run ``function``, and all that they wrote. They meet at the first of them."""
    context, port = multiprocessing.get_context("fork"), free_port()
    started = [
        context.Process(target=_rank, args=(folder, rank, ranks, port, function, arguments))
        for rank in range(ranks)
    ]
    for rank in started:
        rank.start()
    for rank in started:
        rank.join(60)
        rank.kill()
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


def one_head(told, folder, culprit, says):
    """The sentence of the only report, and the report, which is in the file, too."""
    assert told.count(HEAD) == 1, told
    head = told.split(HEAD)[1].splitlines()[0]
    assert re.match(rf"rank {culprit} of \d \(\S+, pid \d+\) has ", head), head
    assert "at step 4" in head and says in head
    report = (folder / "hang-report-step4.txt").read_text()
    assert report in told and report.startswith(head)
    return head, report


@pytest.mark.parametrize(
    ("how", "culprit", "says"),
    [
        ("sleep", 2, "not moved for"),
        ("stop0", 0, "is stopped"),
        ("locked", 2, "a call holds its Python lock"),
    ],
)
def test_a_run_that_hangs_ends_with_one_report(tmp_path, how, culprit, says):
    began = time.monotonic()
    code, out, err = hang(tmp_path, how, 3)
    assert code == 124 and "done" not in out and "Timeout" not in err and "Traceback" not in err, err
    assert time.monotonic() - began < 20  # elastic would wait for 30 s
    head, report = one_head(err, tmp_path, culprit, says)
    source = {"sleep": "the row never comes", "locked": "Python's lock is held"}.get(how)
    assert source is None or f"hanging.py:{line_of(source)} " in head
    others = ", ".join(str(rank) for rank in range(3) if rank != culprit)
    assert f"ranks {others} wait in all_reduce ({SCRIPT}:{line_of('    all_reduce_scalar(1.0)')})" in head
    assert all(re.search(rf"^  {rank} +\S+ +\d+ +4 +computing ", report, re.MULTILINE) for rank in range(3))
    assert report.count("(trains)") == 2  # stacks that are alike are told once
    last = err.strip().splitlines()[-1]
    assert last.endswith("all ranks were ended.") and head.removesuffix(".") in last


def test_a_rank_that_skips_a_collective(tmp_path):
    """What it has started ends with it."""
    codes, told = forked(tmp_path, 2, hanging.main, 2, "skip", tmp_path, 1.0)
    assert codes == [124, 124], told
    head, _ = one_head(told, tmp_path, 1, "not moved for")
    assert (
        f"called from hanging.py:{line_of('goes another way')} hang(); rank 0 waits in all_reduce (" in head
    )
    assert (tmp_path / "child").exists()
    nobody_is_left(tmp_path)


def test_a_rank_that_failed_and_stays_is_named(tmp_path):
    codes, told = forked(tmp_path, 2, hanging.main, 2, "raise", tmp_path, 1.0)
    assert codes[0] == 124
    one_head(
        told, tmp_path, 1, "failed with ValueError: this rank fails at step 4; rank 0 waits in all_reduce"
    )


def test_who_is_slow_goes_on(tmp_path):
    """A step longer than the limit after others that were slow, too, and a save of 2.5 times the limit.

    No thread is left, and stopping takes no time.
    """
    codes, told = forked(tmp_path, 2, hanging.main, 2, "slow", tmp_path, 0.8)
    assert codes == [0, 0] and HEAD not in told, told
    for rank in range(2):
        assert f"rank {rank} done, [], True\n" in told
    assert not list(tmp_path.glob("hang*"))


def test_a_store_that_stops_with_its_rank(tmp_path):
    """The ranks met at rank 0, which is stopped: one of the others reports, by signals alone."""
    codes, told = forked(tmp_path, 3, hanging.main, 3, "stop0", tmp_path, 1.0)
    assert 124 in codes and all(codes), told
    head, _ = one_head(told, tmp_path, 0, "is stopped")
    assert "ranks 1, 2 wait in all_reduce" in head
    nobody_is_left(tmp_path)


@pytest.mark.parametrize("how", ["sleep", "locked"])
def test_a_single_process_reports_and_goes_on(tmp_path, how):
    codes, told = forked(tmp_path, 1, hanging.main, 1, how, tmp_path, 1.0)
    assert codes == [0] and "rank 0 done, [], True" in told, told
    if how == "sleep":
        assert told.count(HEAD) == 1 and f"hanging.py:{line_of('the row never comes')} rows()" in told
        assert "this process (" in told and (tmp_path / "hang-report-step4.txt").exists()
    else:  # by faulthandler's timer, since no Python runs
        assert "Timeout" in told and f"line {line_of('is held')} in hang" in told


# --- the trainer ----------------------------------------------------------------------------------------------


def train(folder, output, config, seconds, phase):
    """A trainer of which a rank sleeps after step 3: where rows are loaded, or while it saves and evaluates."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", kernels="off"
    )
    between = "steps" if phase == "between" else "no"
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, max_steps=5, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy=between, save_steps=3, eval_steps=3, eval_strategy=between,
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS.select(range(2)), tokenizer=tokenizer,
        multi_gpu_config=config,
    )  # fmt: skip
    sleepers = {"get_batch_samples": 1} if phase == "loading" else {"_save": 0, "evaluation_loop": 1}
    for name, sleeper in sleepers.items():
        setattr(trainer, name, sleeping(getattr(trainer, name), sleeper, seconds, trainer))
    trainer.train()
    assert trainer.state.global_step == 5


def sleeping(original, sleeper, seconds, trainer):
    def late(*arguments, **more):
        if get_rank() == sleeper and trainer.state.global_step == 3:
            time.sleep(seconds)
        return original(*arguments, **more)

    return late


def test_a_data_loader_that_hangs(llama, tmp_path):
    codes, told = forked(tmp_path, 2, train, llama, tmp_path, MultiGPUConfig(hang_seconds=1), 1000, "loading")
    assert codes == [124, 124], told
    head, _ = one_head(told, tmp_path, 1, "test_watchdog.py")
    assert " late()" in head and "rank 0 waits in " in head


@pytest.mark.parametrize(("hang_seconds", "phase"), [(1, "between"), (0, "loading")])
def test_a_slow_save_a_slow_evaluation_and_no_watchdog(llama, tmp_path, hang_seconds, phase):
    config = MultiGPUConfig(hang_seconds=hang_seconds)
    codes, told = forked(tmp_path, 2, train, llama, tmp_path, config, 3, phase)
    assert codes == [0, 0] and HEAD not in told, told
    assert not list(tmp_path.glob("hang*"))


# --- parts ----------------------------------------------------------------------------------------------------


def test_hang_seconds():
    assert MultiGPUConfig().hang_seconds == MultiGPUSettings().to_config().hang_seconds == 50
    assert (
        MultiGPUConfig(hang_seconds=0).hang_seconds == 0
        and MultiGPUConfig(hang_seconds=None).hang_seconds is None
    )
    for wrong in (-1, True, False, "60"):
        with pytest.raises(ConfigError, match=r"hang_seconds.*a number above 0"):
            MultiGPUConfig(hang_seconds=wrong)


def test_the_settings_of_a_run_are_those_of_its_trainers(monkeypatch):
    monkeypatch.setattr(process_group, "_settings", MultiGPUConfig())
    process_group.setup_multi_gpu(MultiGPUConfig(num_processes=1, hang_seconds=7))
    process_group.setup_multi_gpu()
    assert process_group.settings_of_run().hang_seconds == 7


def test_limits():
    """Of first steps, steps, callbacks, and what is done in patience; the longest step counts three times."""
    dog = Watchdog(50, 1800, Path())
    clock = dog._clock = FixedClock()
    found = []
    for seconds, step, phase in [
        (0, 1, "computing"), (100, 2, "between steps"), (1, 2, "computing"), (40, 3, "computing"), (9, 4, "computing"),
        (500, 4, "callbacks"), (500, 5, "computing"),
    ]:  # fmt: skip
        clock.seconds += seconds
        dog.progress(step, phase)
        found.append(round(dog.limit()))
    with dog.patient("saving"):
        found.append(dog.limit())
        dog.progress(5, "computing")
        found.append(dog.limit())
        assert dog._mark.phase == "saving"
    # Step 4's computing took 500 s until the callbacks began.
    assert found == [600, 300, 300, 120, 120, 600, 1500, 1800, 1800] and dog.limit() == 1500


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


def findings(*frames, **marks):
    return [
        hang_report.Finding(
            rank,
            Beat(Place(rank, "host", "", 10 + rank, 0, 1, ""), 1, 17, "computing", marks.get(f"marks{rank}", 5)),
            63.0, None, stacks.Stacks((stacks.Thread("MainThread", True, one),)),
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
    # Waits of GPUs are no calls that could be seen: who is behind is to blame.
    item, loader = (("trainer.py", 7, "item"),), (("data.py", 5, "read"),)
    assert [one.rank for one in hang_report.blamed(findings(item, loader, item, marks1=4))] == [1]


def test_stacks_as_faulthandler_writes_them():
    text = (
        'Thread 0x00000000000000ff (most recent call first):\n  File "/a b/c.py", line 7 in f\n\n'
        'Current thread 0x0000000000000001 (most recent call first):\n  File "x.py", line 1 in <module>\n'
    )
    first, second = stacks.parse(text, trains=0xFF)
    assert first.trains and first.frames == (("/a b/c.py", 7, "f"),) and not second.trains


def test_a_word_of_the_training_thread_costs_nothing():
    dog = Watchdog(50, 1800, Path())
    began = time.perf_counter()
    for step in range(10_000):
        dog.progress(step, "computing")
    assert (time.perf_counter() - began) / 10_000 < 50e-6
