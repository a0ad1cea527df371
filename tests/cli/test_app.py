"""The ``pantheraml`` command, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pantheraml.cli.app import main
from pantheraml.config.load import load_config
from pantheraml.config.source import parse_value
from pantheraml.version import __version__

ROOT = Path(__file__).parents[2]
SMALL = """\
model: {model_name: tiny, load_in_16bit: true}
data: {use_debug_dataset: true, validation_fraction: 0.25}
trainer: {output_dir: out, per_device_train_batch_size: 2, gradient_accumulation_steps: 4, max_steps: 3}
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONFIG_PATH", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def cli(capsys):
    """``cli("train", ...)`` -> exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(words))
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


def test_a_dry_run_shows_the_resolved_settings_and_what_would_happen(cli, run_file, tmp_path):
    code, out, err = cli(
        "train", "run.yaml", "lora.r=4", "--dry-run", "trainer.learning_rate=1e-4", "devices=cpu"
    )
    assert (code, err) == (0, "")
    (tmp_path / "resolved.yaml").write_text(out)
    config = load_config("resolved.yaml")
    assert (config.lora.r, config.trainer.learning_rate, config.device) == (4, 1e-4, "cpu")
    table = dict(line[4:].split("  ", 1) for line in out.splitlines() if line.startswith("#   "))
    shown = {name: text.strip() for name, text in table.items()}
    assert shown == {
        "model": "tiny, 16-bit, sequences of up to 2048 tokens",
        "trained": "LoRA of rank 4 on the usual layers of its family",
        "device": "cpu",
        "rows": "the debug data set, split train",
        "evaluation": "25% of the rows, held out",
        "batch": "2 per device x 4 accumulated = 8 per step",
        "packing": "off",
        "duration": "3 steps",
        "learning rate": "0.0001",
        "saved": "out/adapter",
    }
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (["model.full_finetuning=true", "model.load_in_16bit=false", "model.dtype=bf16"], "tiny, bfloat16"),
        (["model.load_in_16bit=false"], "tiny, 4-bit"),
        (["model.load_in_16bit=false", "model.load_in_8bit=true"], "tiny, 8-bit"),
        (["model.load_in_16bit=false", "model.load_in_fp8=true"], "tiny, FP8"),
        (["model.full_finetuning=true"], "all weights"),
        (["lora.target_modules=[q_proj, v_proj]"], "LoRA of rank 16 on q_proj, v_proj"),
        (["data={path: rows.jsonl, eval_path: e.jsonl}"], "e.jsonl, split train"),
        (["data={path: rows.jsonl, eval_split: test, max_rows: 7}"], "the first 7 rows"),
        (["data={loader: 'rows:load'}"], "what the loader returns"),
        (["data={use_debug_dataset: true}"], "the debug data set, split validation"),
        (["data={path: rows.jsonl}"], "none"),
        (["trainer.packing=true"], "into 2048 tokens"),
        (["trainer.max_steps=null", "trainer.num_train_epochs=2"], "2 epochs"),
        (["trainer.gradient_accumulation_steps=null"], "rows per device: 2; accumulated: TRL's default"),
        (["train_on_responses=true"], "the assistant's turns alone"),
        (["save={formats: [adapter, merged_16bit], folder: final}"], "final/adapter, final/merged_16bit"),
        (["save={formats: []}"], "checkpoints only"),
        (["devices=[0, 1]"], "2 ranks, each with a visible GPU of its own"),
        (["devices=[0, 1]"], "2 per device x 4 accumulated x 2 ranks = 16 per step"),
        (["devices=cpu", "multi_gpu.num_processes=3"], "3 ranks on the CPU"),
        (["multi_gpu=true"], "2 per device x 4 accumulated x a rank for each visible GPU"),
        (["multi_gpu=true", "model.device_map=balanced"], "by device_map balanced"),
        (["multi_gpu=true", "model.device_map=balanced"], "2 per device x 4 accumulated = 8 per step"),
        (["multi_gpu=true", "trainer.global_batch_size=24"], "24 per step on all ranks, up to 2 per device at a time"),
        (["multi_gpu.strategy=none"], "the first GPU, or the CPU"),
        (["model.auto_device_map=true"], "by device_map auto"),
    ],
)  # fmt: skip
def test_the_table_of_a_dry_run(cli, run_file, overrides, row):
    code, out, _ = cli("train", "run.yaml", "--dry-run", *overrides)
    assert code == 0
    assert any(row in line for line in out.splitlines() if line.startswith("#   ")), out


@pytest.mark.promise("D3")
@pytest.mark.parametrize(
    "words", [["run.yaml"], ["--config", "run.yaml"], ["seed=2", "--config", "run.yaml"]]
)
def test_ways_to_name_the_run_file(cli, run_file, words):
    code, out, _ = cli("train", "--dry-run", *words)
    assert code == 0
    assert parse_value(out)["seed"] == (2 if "seed=2" in words else 3407)


def test_the_run_file_of_the_environment(cli, run_file, monkeypatch, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(SMALL + "seed: 5\n")
    monkeypatch.setenv("CONFIG_PATH", str(other))
    assert parse_value(cli("train", "--dry-run")[1])["seed"] == 5
    assert parse_value(cli("train", "--dry-run", "seed=6")[1])["seed"] == 6
    assert parse_value(cli("train", "--dry-run", "run.yaml")[1])["seed"] == 3407


def test_errors_are_text_without_a_traceback(cli, run_file):
    code, out, err = cli("train", "run.yaml", "trainer.lr=1", "lora.r=0")
    assert (code, out) == (2, "")
    assert err == (
        "pantheraml: run.yaml has 2 problems:\n"
        "  override lora.r: lora.r is 0; it takes a whole number of at least 1.\n"
        "  override trainer.lr: there is no setting trainer.lr. Write trainer.learning_rate.\n"
    )
    code, out, err = cli("train", "--dry-run")
    assert (code, out) == (2, "")
    assert err.startswith("pantheraml: No run file is given.")


def test_debug_shows_the_traceback(run_file):
    from pantheraml.errors import ConfigError

    with pytest.raises(ConfigError, match=r"trainer\.lr"):
        main(["train", "run.yaml", "trainer.lr=1", "--debug"])


def test_versions_schema_and_wrong_words(cli):
    assert cli("--version") == (0, f"{__version__}\n", "")
    assert cli("version") == (0, f"{__version__}\n", "")
    code, out, _ = cli("schema")
    assert code == 0
    assert json.loads(out)["required"] == ["model"]
    code, _, err = cli("trian")
    assert code == 2
    assert "trian" in err
    assert cli("train", "--nonsense")[0] == 2


def test_the_example_run_file_is_right(cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = cli("train", "examples/configs/lora.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert "8 per step" in out


def test_the_documented_sections_are_those_of_the_schema(cli):
    page = (ROOT / "docs/configuration.md").read_text()
    table = page.partition("## Sections")[2].partition("\n\nA key")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in table.splitlines() if "`" in line]
    assert sorted(name for name, _ in rows) == sorted(json.loads(cli("schema")[1])["properties"])
    from pantheraml.config.names import SECTION_ALIASES

    assert {alias: name for name, alias in rows if alias} == SECTION_ALIASES


def python(*words: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)


@pytest.mark.promise("D3")
def test_the_module_train_reads_the_same_words(run_file, tmp_path):
    by_option = python("pantheraml.train", "--config", "run.yaml", "seed=8", "--dry-run", cwd=tmp_path)
    by_environment = python(
        "pantheraml.train", "seed=8", "--dry-run", cwd=tmp_path, env={"CONFIG_PATH": "run.yaml"}
    )
    assert by_option.returncode == by_environment.returncode == 0
    assert by_option.stdout == by_environment.stdout
    assert parse_value(by_option.stdout)["seed"] == 8
    assert python("pantheraml.train", "nothing.yaml", cwd=tmp_path).returncode == 2


def test_a_dry_run_is_quick_and_loads_nothing_heavy(run_file, tmp_path):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = python("pantheraml", "train", "run.yaml", "--dry-run", cwd=tmp_path)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert min(times) < 1.0
    check = (
        "import sys\nfrom pantheraml.cli.app import main\n"
        "try: main(['train', 'run.yaml', '--dry-run'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes and SIGINT are those of POSIX")
def test_ctrl_c_leaves_with_130_and_no_traceback(tmp_path):
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "pantheraml", "train", str(pipe)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Opening the other end waits until the command reads its run file, which never comes.
    with pipe.open("w"):
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "pantheraml: interrupted\n"
