"""A disk that is full at one checkpoint costs the run that one, on whichever rank it is; at the end it is an error."""

from __future__ import annotations

import resource
import shutil
from functools import partial
from logging import getLogger
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, MultiGPUConfig, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.checkpoint.manifest import problems
from pantheraml.checkpoint.pointers import read_pointer
from pantheraml.errors import SaveError
from pantheraml.training.agreeing import DiskRefused, agreeing
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.small_disk import small_disk
from tests.training.test_checkpoints import ROWS


class Full(TrainerCallback):
    """No room on a rank's disk from the end of one step to that of another.

    Rank 0 writes the large files: its disk is filled up. Rank 1 writes a small one: it may write no larger one.
    """

    def __init__(self, rank, steps, turn=None):
        self.rank, self.steps = rank, steps
        self.turn = turn or (refuse if rank else fill)
        self.saved, self.best = [], {}

    def on_step_end(self, args, state, control, **kwargs):
        self.best[state.global_step] = state.best_model_checkpoint
        if args.process_index == self.rank and state.global_step in self.steps:
            self.turn(args.output_dir, state.global_step == self.steps[0])

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


ADAPTER = dict(load_in_4bit=False, device_map="cpu")
IN_SHARES = dict(full_finetuning=True, use_multi_gpu=MultiGPUConfig(strategy="fsdp"))


def fill(output, full):
    """Leave no room on the disk, or as much as before."""
    if full:
        with Path(output, "ballast").open("wb") as file:
            file.write(bytes(shutil.disk_usage(output).free - 4096))
    else:
        Path(output, "ballast").unlink()


def refuse(output, full, most=2000):
    """Let this process write files of ``most`` bytes only, or any."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if full else hard, hard))


def run(folder, output, full, load=ADAPTER):
    """A run that saves at steps 2, 4 and 6: what it said, what callbacks saw, and its error."""
    said = BufferingHandler(999)
    getLogger("pantheraml").addHandler(said)
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), 64, **load)
    if load is ADAPTER:
        model = FastLanguageModel.get_peft_model(model, r=2)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, max_steps=6, save_strategy="steps", save_steps=2,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="eval_loss", load_best_model_at_end=True,
    )  # fmt: skip
    trainer = PantheraMLTrainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS, tokenizer=tokenizer, callbacks=[full]
    )
    error = None
    try:
        trainer.train()
    except SaveError as found:
        error = str(found)
    warnings = [record.getMessage() for record in said.buffer if record.levelname == "WARNING"]
    return warnings, full.saved, full.best, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def disk(tmp_path):
    """A real file system of two megabytes."""
    with small_disk(tmp_path, "2m"):
        yield tmp_path


def left(output):
    return sorted(path.name for path in output.iterdir() if path.name not in ("README.md", "telemetry.jsonl"))


@pytest.mark.parametrize(("rank", "reason"), [(0, "free"), (1, "Rank 1: Saving to")])
def test_the_run_goes_on(folder, disk, rank, reason):
    (warnings, *seen), (_, *others) = run_ranks(2, run, folder, disk, Full(rank, (3, 5)))
    saved, best, error = seen
    assert saved == others[0] == [2, 6], "nobody is told of a checkpoint that is not there"
    assert error is None and others[2] is None
    assert best[5] == others[1][5] == str(disk / "checkpoint-2"), "what is not there is not the best one"
    assert left(disk) == ["best.json", "checkpoint-2", "checkpoint-6", "latest.json"]
    assert not problems(disk / "checkpoint-2") and not problems(disk / "checkpoint-6")
    assert read_pointer(disk, "latest").step == read_pointer(disk, "best").step == 6
    assert len(warnings) == 1 and f"Saving to {disk / 'checkpoint-4'} stopped" in warnings[0]
    assert reason in warnings[0] and "Training goes on" in warnings[0]
    assert "The last one is checkpoint-2, of " in warnings[0]


def test_the_last_one_has_to_be_there(folder, tmp_path):
    found = run_ranks(2, run, folder, tmp_path, Full(1, (5,)))
    for rank, (warnings, saved, _, error) in enumerate(found):
        assert saved == [2, 4] and not warnings
        assert error.startswith(f"{'' if rank else 'Rank 1: '}Saving to {tmp_path / 'checkpoint-6'} stopped")
    assert left(tmp_path) == ["best.json", "checkpoint-2", "checkpoint-4", "latest.json"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_cannot_write_its_part(folder, tmp_path, rank):
    """Of what ranks share out, each writes a part: rank 0 the weights, too."""
    large = partial(refuse, most=100_000)  # smaller ones are there: random numbers, say
    by_rank = run_ranks(2, run, folder, tmp_path, Full(rank, (3, 5), large), IN_SHARES)
    warnings = by_rank[0][0]
    assert [(saved, error) for _, saved, _, error in by_rank] == 2 * [([2, 6], None)]
    assert left(tmp_path) == ["best.json", "checkpoint-2", "checkpoint-6", "latest.json"]
    for checkpoint in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"):
        assert not problems(checkpoint) and len(list(checkpoint.rglob("*.distcp"))) == 2
    whose = "Rank 1: " if rank else ""
    assert len(warnings) == 1 and ("torch.save could not write" if rank else "File too large") in warnings[0]
    assert warnings[0].startswith(f"{whose}Saving to {tmp_path / 'checkpoint-4'} stopped")


def fail(kinds, tmp_path):
    """The error of each rank of a part of a save in which ranks fail in several ways."""
    from pantheraml.distributed.process_group import get_rank

    error = kinds[get_rank()]
    try:
        with agreeing(tmp_path / "checkpoint-1"):
            if error is not None:
                raise error
    except Exception as found:
        return type(found), str(found)
    return None


def test_ranks_leave_a_save_by_one_kind_of_error(tmp_path):
    full = OSError(28, "No space left on device", "a file")
    assert run_ranks(2, fail, [None, None], tmp_path) == [None, None]
    mine, other = run_ranks(2, fail, [None, full], tmp_path)
    assert mine[0] is other[0] is DiskRefused and mine[1] == f"Rank 1: {other[1]}"
    mine, other = run_ranks(2, fail, [full, KeyError("a bug")], tmp_path)
    assert other == (KeyError, "'a bug'"), "a bug is no full disk, and no run goes on with it"
    assert mine == (SaveError, "Rank 1: KeyError: a bug.")
