"""The printed run file on one process: it runs, every key acts, the printed hook brings the rows.

On ranks: ``test_train_ranks.py``.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from pantheraml import cleanup_multi_gpu
from pantheraml.cli.app import main
from pantheraml.cli.rows import call_loader
from pantheraml.config.load import load_config
from pantheraml.errors import DataError
from tests.config.test_load import GUIDE
from tests.distributed.ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples/configs/process_isolation.yaml"
HOOK = """\
from datasets import Dataset, DatasetDict
def get_dataset(config, tokenizer):
    assert config.loader == "custom_dataset:get_dataset"
    texts = [f"<|im_start|>user\\n{n}?<|im_end|>\\n<|im_start|>assistant\\n{n}!<|im_end|>" for n in range(24)]
    rows = Dataset.from_list([{"text": text + tokenizer.eos_token} for text in texts])
    return DatasetDict(train=rows.select(range(20)), validation=rows.select(range(20, 24)))
"""


@pytest.fixture
def printed(tmp_path, monkeypatch, llama):
    """The run file as it is printed but for its model, in the current folder; its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(GUIDE.replace("unsloth/Llama-3.2-1B-Instruct", str(llama)))
    yield "run.yaml"
    cleanup_multi_gpu()


def log_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "telemetry.jsonl").read_text().splitlines()]


@pytest.fixture
def run(capsys, caplog):
    """``run(words)`` -> what ``pantheraml train words`` prints, and what it says of the run."""

    def call(*words: str) -> tuple[str, str]:
        with caplog.at_level(logging.INFO, logger="pantheraml"), pytest.raises(SystemExit) as left:
            main(["train", *words])
        out, err = capsys.readouterr()
        assert not left.value.code, err
        return out, "\n".join(caplog.messages)

    return call


@pytest.mark.promise("D3")
def test_the_example_is_the_printed_file():
    lines = EXAMPLE.read_text().splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("#")).strip() == GUIDE.strip()


@pytest.mark.promise("D3", "D4", "D5", "D6")
def test_it_trains_evaluates_logs_and_saves(printed, run, monkeypatch):
    monkeypatch.setenv("CONFIG_PATH", printed)
    out, said = run("devices=cpu")
    folder = Path("debug_output")
    for line in ("396 rows; 1 x 1 x 1 = 1 rows a step", "3 of 32 tokens are trained on"):
        assert line in said, said
    assert (folder / "adapter/adapter_model.safetensors").is_file() and (folder / "checkpoint-3").is_dir()
    kept = json.loads((folder / "all_results.json").read_text())
    assert kept["eval_loss"] > 0 and kept["eval_perplexity"] > 1 and 0 <= kept["eval_mean_token_accuracy"] < 1
    assert f"  eval_loss: {kept['eval_loss']:.4g}\n" in out and "  log: debug_output/telemetry.jsonl\n" in out
    # Three steps end before the first line that the library would log.
    (line,) = log_of("debug_output")
    assert line["step"] == 3 and line["loss"] == pytest.approx(kept["train_loss"])
    assert line["devices"]["cpu"]["rss"] > 0.1


@pytest.mark.promise("D3")
def test_every_key_acts(printed, run, tmp_path):
    """The same file with another value of each key; what the run says and writes follows each."""
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one two three four five six seven eight nine ten"}\n' * 30
    )
    changes = [
        "devices=cpu", "train_on_responses=false", "trainer_config.per_device_train_batch_size=2",
        "trainer_config.gradient_accumulation_steps=3", "trainer_config.max_steps=2",
        "trainer_config.learning_rate=5e-3", "trainer_config.output_dir=elsewhere",
        "pretrained_model_config.max_seq_length=8", "dataset_config={path: rows.jsonl}",
        "trainer_config.logging_steps=1",
    ]  # fmt: skip
    _, said = run(printed, *changes)
    for line in ("30 rows; 2 x 3 x 1 = 6 rows a step", "8 of 8 tokens are trained on"):
        assert line in said, said
    first, last = log_of("elsewhere")
    assert (last["step"], first["learning_rate"]) == (2, 5e-3) and last["total_tokens"] == 2 * 6 * 8
    assert not Path("debug_output").exists()


@pytest.mark.promise("D4")
def test_the_printed_hook(printed, run, tmp_path, monkeypatch):
    (tmp_path / "custom_dataset.py").write_text(HOOK)
    monkeypatch.delitem(sys.modules, "custom_dataset", raising=False)
    data = "dataset_config={use_debug_dataset: false, loader: 'custom_dataset:get_dataset'}"
    out, said = run("--config", printed, data, "devices=cpu", "trainer_config.max_steps=1")
    assert "20 rows; " in said and "eval_loss: " in out
    assert "<|im_start|>assistant\n‹" in said, "only the answers are trained on"


def call_on_ranks(seeds):
    """What a loader that shuffles by another seed on each rank comes to."""
    import torch.distributed as dist
    from datasets import Dataset

    config = load_config(EXAMPLE, ["dataset_config={loader: 'rows:load'}"])
    rows = Dataset.from_list([{"text": str(number)} for number in range(50)])
    seed = seeds[dist.get_rank()]
    try:
        found, _ = call_loader(lambda data, tokenizer: rows.shuffle(seed=seed), config, None)
        return [row["text"] for row in found]
    except DataError as error:
        return str(error)


@pytest.mark.promise("D4")
def test_ranks_must_get_the_same_rows():
    one, other = run_ranks(2, call_on_ranks, [7, 7])
    assert one == other and len(one) == 50
    told = run_ranks(2, call_on_ranks, [7, 8])
    assert told[0] == told[1] and told[0].startswith(
        "rows:load returned other rows on rank 1 than on rank 0."
    )
