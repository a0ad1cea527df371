"""One run file, the same numbers: one process, ranks that the command starts, torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pantheraml.cli.app import _clean_errors
from pantheraml.config.load import load_config
from pantheraml.errors import DataError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.rank_files import would_come_again
from pantheraml.launch.ranks import FirstTraceback
from tests.launch.test_agent import environment

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} plus two?"},
            {"role": "assistant", "content": f"It is {number + 2}."},
        ]
    }
    for number in range(21)
]
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


def write_run(folder: Path, model: Path) -> None:
    """A run of three steps of eight rows, evaluated at the end, in ``folder``."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "run.yaml").write_text(f"""\
devices: cpu
model: {{model_name: {model}, max_seq_length: 64, load_in_4bit: false, dtype: fp32}}
lora: {{r: 2, lora_alpha: 4}}
data: {{path: rows.jsonl, validation_fraction: 0.2}}
train_on_responses: true
multi_gpu: {{num_processes: 2}}
trainer: {{output_dir: out, max_steps: {STEPS}, per_device_train_batch_size: 2, gradient_accumulation_steps: 2,
          learning_rate: 1e-3, bf16: false, logging_steps: 1, eval_strategy: steps, eval_steps: {STEPS},
          report_to: none}}
""")


def losses(folder: Path) -> list[dict[str, float]]:
    """What the run in ``folder`` logged of each step and of the evaluation, by its checkpoint."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    names = ("loss", "grad_norm", "eval_loss")
    return [{name: log[name] for name in names if name in log} for log in state["log_history"]]


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    """The run of one process, with as many rows a step."""
    from pantheraml.cli.train import run_training

    folder = tmp_path_factory.mktemp("alone")
    write_run(folder, llama)
    paths = [f"trainer.output_dir={folder / 'out'}", f"data.path={folder / 'rows.jsonl'}"]
    changes = ["multi_gpu=null", "trainer.gradient_accumulation_steps=4", "trainer.disable_tqdm=true"]
    run_training(load_config(folder / "run.yaml", [*paths, *changes]))
    return losses(folder / "out")


def command(folder: Path, words: list[str], **variables: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``words`` in ``folder``."""
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=folder, env=environment(**variables), timeout=100, check=False
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.promise("D5")
@pytest.mark.parametrize(
    ("words", "variables"),
    [
        pytest.param([CONSOLE_SCRIPT, "train", "run.yaml"], {}, marks=pytest.mark.slow),
        ([sys.executable, "-m", "pantheraml.train"], {"CONFIG_PATH": "run.yaml"}),
        pytest.param(
            [*TORCHRUN, "-m", "pantheraml.train", "--config", "run.yaml", "multi_gpu=null"],
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pantheraml train", "python -m pantheraml.train", "torchrun"],
)
def test_ranks_train_to_the_numbers_of_one_process(llama, alone, tmp_path, words, variables):
    write_run(tmp_path, llama)
    code, out, err = command(tmp_path, [*words, "trainer.output_dir=ranks", "seed=3407"], **variables)
    assert code == 0, err
    folder = tmp_path / "ranks"
    assert [sorted(log) for log in alone] == [["grad_norm", "loss"]] * STEPS + [["eval_loss"]]
    for mine, theirs in zip(losses(folder), alone, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    # Everything is written and said once, by rank 0.
    assert out.count("Training has ended.") == 1
    for line in ("LoRA r=2: ", "= 8 rows a step", "Saved the adapter to ranks/adapter."):
        assert err.count(line) == 1, line
    assert ("starting 2 ranks of this script" in err) == (words[:3] != TORCHRUN[:3])
    assert len((folder / "telemetry.jsonl").read_text().splitlines()) == STEPS
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run.yaml", "ranks"}
    overrides = ["trainer.output_dir=ranks", *[word for word in words if word == "multi_gpu=null"]]
    assert load_config(folder / "run.yaml") == load_config(tmp_path / "run.yaml", overrides)


@pytest.mark.promise("D1")
def test_a_rank_that_fails_is_heard_once(llama, tmp_path):
    write_run(tmp_path, llama)
    (tmp_path / "rows_of_mine.py").write_text(LOADER)
    words = [CONSOLE_SCRIPT, "train", "run.yaml", "data={loader: 'rows_of_mine:load'}"]
    code, out, err = command(tmp_path, [*words, "trainer.eval_strategy=no", "trainer.eval_steps=null"])
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
