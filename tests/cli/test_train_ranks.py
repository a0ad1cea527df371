"""The printed run file, the same numbers: one process, ranks that the command starts, torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import typer

from pantheraml.cli.app import _clean_errors
from pantheraml.config.load import load_config
from pantheraml.errors import DataError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.rank_files import would_come_again
from pantheraml.launch.ranks import FirstTraceback
from tests.config.test_load import GUIDE
from tests.launch.test_agent import environment

LOADER = """\
from datasets import Dataset
from pantheraml import get_rank
def load(data, tokenizer):
    if get_rank() == 1:
        raise ValueError("rows are gone")
    return Dataset.from_list([{"text": "one two three"}] * 8)
"""
CONSOLE_SCRIPT = str(Path(sys.executable).with_name("pantheraml"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
STEPS = 3
EVALUATED = ("eval_loss", "eval_mean_token_accuracy", "eval_perplexity")


# What is not as printed: the model, and a step of eight rows on two ranks, logged and evaluated.
WORDS = [
    "devices=cpu", "multi_gpu.num_processes=2", "pretrained_model_config.load_in_4bit=false",
    "trainer_config.per_device_train_batch_size=2", "trainer_config.gradient_accumulation_steps=2",
    "trainer_config.logging_steps=1", "trainer_config.eval_strategy=steps", f"trainer_config.eval_steps={STEPS}",
]  # fmt: skip


def write_run(folder: Path, model: Path) -> None:
    """The printed file in ``folder``, with a model that is there."""
    (folder / "run.yaml").write_text(GUIDE.replace("unsloth/Llama-3.2-1B-Instruct", str(model)))


def losses(folder: Path) -> list[dict[str, float]]:
    """What the run in ``folder`` logged of each step and of the evaluation, by its checkpoint."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    names = ("loss", "grad_norm", *EVALUATED)
    return [{name: log[name] for name in names if name in log} for log in state["log_history"]]


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    """The run of one process, with as many rows a step."""
    from pantheraml.cli.train import run_training

    folder = tmp_path_factory.mktemp("alone")
    write_run(folder, llama)
    changes = ["multi_gpu=null", "trainer.gradient_accumulation_steps=4", "trainer.disable_tqdm=true"]
    run_training(load_config(folder / "run.yaml", [*WORDS, *changes, f"trainer.output_dir={folder / 'out'}"]))
    return losses(folder / "out")


def command(folder: Path, words: list[str], **variables: str) -> tuple[int, str, str, list[str]]:
    """Exit code, standard output and standard error of ``words`` in ``folder``, and its log's first lines as it ran."""
    log, followed, end = folder / "ranks" / "telemetry.jsonl", [], time.monotonic() + 100
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        master = subprocess.Popen(words, stdout=out, stderr=err, cwd=folder, env=environment(**variables))
        while master.poll() is None and time.monotonic() < end:
            if not followed and log.exists():
                followed = log.read_text().splitlines()
            time.sleep(0.02)
        master.kill()
        code = master.wait()
        said = [file.seek(0) or file.read() for file in (out, err)]
    return code, *said, followed


@pytest.mark.promise("D1", "D3", "D5", "D6")
@pytest.mark.parametrize(
    ("words", "variables"),
    [
        pytest.param([CONSOLE_SCRIPT, "train", "run.yaml"], {}, marks=pytest.mark.slow),
        ([sys.executable, "-m", "pantheraml.train"], {"CONFIG_PATH": "run.yaml"}),
        pytest.param(
            [*TORCHRUN, "-m", "pantheraml.train", "--config", "run.yaml"],
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pantheraml train", "python -m pantheraml.train", "torchrun"],
)
def test_ranks_train_to_the_numbers_of_one_process(llama, alone, tmp_path, words, variables):
    write_run(tmp_path, llama)
    changes = [*WORDS, *(["multi_gpu=null"] if words[:3] == TORCHRUN[:3] else []), "trainer.output_dir=ranks"]
    code, out, err, followed = command(tmp_path, [*words, *changes], **variables)
    assert code == 0, err
    assert f"  eval_perplexity: {alone[-1]['eval_perplexity']:.4g}\n" in out
    folder = tmp_path / "ranks"
    assert [sorted(log) for log in alone] == [["grad_norm", "loss"]] * STEPS + [[*EVALUATED]]
    for mine, theirs in zip(losses(folder), alone, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    kept = json.loads((folder / "all_results.json").read_text())
    assert {name: kept[name] for name in EVALUATED} == pytest.approx(alone[-1], rel=1e-6)
    # Everything is written and said once, by rank 0.
    assert out.count("Training has ended.") == 1
    for line in ("LoRA r=16: ", "= 8 rows a step", "Saved the adapter to ranks/adapter."):
        assert err.count(line) == 1, line
    assert ("starting 2 ranks of this script" in err) == (words[:3] != TORCHRUN[:3])
    lines = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, STEPS]
    assert all(line["devices"].keys() == {"cpu_0", "cpu_1"} for line in lines)
    assert json.loads(followed[0])["step"] == 1, "the log is there before the run has ended"
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "ranks"}
    assert load_config(folder / "run.yaml") == load_config(tmp_path / "run.yaml", changes)


@pytest.mark.promise("D1")
def test_a_rank_that_fails_is_heard_once(llama, tmp_path):
    write_run(tmp_path, llama)
    (tmp_path / "rows_of_mine.py").write_text(LOADER)
    words = [CONSOLE_SCRIPT, "train", "run.yaml", *WORDS[:3], "data={loader: 'rows_of_mine:load'}"]
    code, out, err, _ = command(tmp_path, words)
    assert code == 1, err
    assert err.count("ValueError: rows are gone") == err.count("Traceback (most recent call last)") == 1
    assert "rank 1 ended with exit code 1" in err
    assert "Training has ended." not in out


def test_an_error_of_ours_is_text_and_comes_from_one_rank(tmp_path, capsys, monkeypatch):
    """Ranks put their hook in front of the command's; the second to fail says nothing."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for rank in (1, 0):
        with pytest.raises(typer.Exit) as left, _clean_errors(debug=False):
            here = LaunchEnvironment(
                "pantheraml", rank=rank, local_rank=rank, world_size=2, local_world_size=2
            )
            sys.excepthook = FirstTraceback(here, tmp_path, sys.excepthook)
            raise DataError(f"Rank {rank} has no rows.")
        assert left.value.exit_code == 2
    err = capsys.readouterr().err
    assert err.startswith("PantheraML: rank 1 of 2 on ")
    assert err.endswith(" failed:\npantheraml: Rank 1 has no rows.\n")
    assert sorted(path.name for path in tmp_path.glob("rank_*")) == ["rank_0.txt", "rank_1.txt"]
    assert would_come_again(tmp_path), "restarting the ranks would not help"
