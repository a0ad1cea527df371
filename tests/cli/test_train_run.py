"""Whole runs from run files: a tiny model, real rows, real folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pantheraml.cli.app import main
from pantheraml.config.load import load_config
from pantheraml.errors import ConfigError, DataError, HardwareError, SaveError

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} plus two?"},
            {"role": "assistant", "content": f"It is {number + 2}."},
        ]
    }
    for number in range(12)
]


@pytest.fixture
def settings(tmp_path, monkeypatch, llama):
    """``settings("key=value", ...)`` -> a run of two steps on the CPU in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.yaml").write_text(f"""\
devices: cpu
model: {{model_name: {llama}, max_seq_length: 64, load_in_4bit: false, dtype: fp32}}
lora: {{r: 2, lora_alpha: 4}}
data: {{path: rows.jsonl}}
trainer: {{output_dir: out, max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1e-2, bf16: false,
          logging_steps: 1, disable_tqdm: true}}
""")
    return lambda *overrides: load_config("run.yaml", overrides)


def run(config):
    from pantheraml.cli.train import run_training

    return run_training(config)


@pytest.mark.promise("D5")
def test_an_adapter_run_trains_evaluates_and_saves(settings, capsys):
    from safetensors.torch import load_file

    config = settings(
        "data.validation_fraction=0.25", "train_on_responses=true", "save.formats=[adapter, merged_16bit]"
    )
    result = run(config)
    assert result["metrics"]["train_loss"] > 0
    assert result["metrics"]["eval_loss"] > 0
    assert set(result["paths"]) == {"adapter", "merged_16bit", "output_dir", "run_file", "results", "log"}
    adapter = load_file(Path("out/adapter/adapter_model.safetensors"))
    assert any(weight.abs().sum() > 0 for name, weight in adapter.items() if "lora_B" in name)
    assert json.loads(Path("out/adapter/adapter_config.json").read_text())["r"] == 2
    assert Path("out/adapter/tokenizer.json").is_file()
    assert list(Path("out/merged_16bit").glob("*.safetensors"))
    assert load_config("out/run.yaml") == config
    printed = capsys.readouterr().out
    assert all(path in printed for path in result["paths"].values())


def test_a_full_run_resumes_where_it_stopped(settings):
    full = ["model.full_finetuning=true", "lora=null", "trainer.save_steps=1"]
    whole = run(settings(*full, "trainer.output_dir=whole"))
    assert Path("whole/model/model.safetensors").is_file()
    resumed = run(
        settings(*full, "trainer.output_dir=again", "trainer.resume_from_checkpoint=whole/checkpoint-1")
    )
    from safetensors.torch import load_file

    one, two = (load_file(Path(folder, "model/model.safetensors")) for folder in ("whole", "again"))
    assert one.keys() == two.keys()
    assert all(one[name].allclose(two[name], atol=1e-6) for name in one)
    assert resumed["metrics"]["epoch"] == whole["metrics"]["epoch"]
    measured = Path("whole/train_results.json").read_text()
    run(settings(*full, "trainer.output_dir=whole", "trainer.resume_from_checkpoint=auto"))
    assert Path("whole/train_results.json").read_text() == measured, "of a run that is over"


@pytest.mark.promise("D4")
def test_a_loader_of_ones_own(settings, tmp_path):
    (tmp_path / "loader_rows.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        "def load(data, tokenizer):\n"
        "    rows = [{'text': data.split + ' ' + tokenizer.eos_token}] * 8\n"
        "    return DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows[:2]))\n"
    )
    result = run(
        settings(
            "data={loader: 'loader_rows:load'}", "trainer.eval_strategy=epoch", "save.formats=[]",
            "trainer.logging_steps=null", "trainer.logging_strategy=no",
        )
    )  # fmt: skip
    assert result["metrics"]["eval_loss"] > 0
    (line,) = Path(result["paths"]["log"]).read_text().splitlines()
    assert "loss" not in json.loads(line), "the last step is not logged, either"
    assert not Path("out/adapter").exists()


def test_the_command_trains_and_says_where_everything_is(settings, capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "run.yaml", "trainer.max_steps=1", "data.max_rows=4"])
    assert not left.value.code
    assert "adapter: out/adapter" in capsys.readouterr().out


def test_the_arguments_of_the_trainer(settings):
    from pantheraml.cli.train import build_arguments

    arguments = build_arguments(settings("trainer.extra={ddp_timeout: 60}", "data.text_field=body", "seed=4"))
    assert arguments.dataset_text_field == "body"
    assert (arguments.ddp_timeout, arguments.seed, arguments.use_cpu) == (60, 4, True)
    assert build_arguments(settings("trainer.max_length=32")).max_length == 32


def test_rows_are_cut_at_the_length_of_the_model(settings, monkeypatch):
    from pantheraml.training.distributed import PantheraMLDistributedTrainer

    lengths = []

    class Watched(PantheraMLDistributedTrainer):
        def train(self, **options):
            lengths.extend(len(ids) for ids in self.train_dataset["input_ids"])
            return super().train(**options)

    monkeypatch.setattr("pantheraml.training.distributed.PantheraMLDistributedTrainer", Watched)
    run(settings("model.max_seq_length=16", "trainer.max_steps=1", "save.formats=[]"))
    assert max(lengths) == 16


def test_an_adapter_is_trained_further(settings):
    from safetensors.torch import load_file

    run(settings("save.folder=first"))
    run(settings("model.model_name=first/adapter", "save.folder=second", "trainer.learning_rate=1e-1"))
    one, two = (
        load_file(Path(folder, "adapter/adapter_model.safetensors")) for folder in ("first", "second")
    )
    assert one.keys() == two.keys()
    assert any(not one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["trainer.extra={ddp_timout: 1}"], ConfigError, "Did you mean 'ddp_timeout'"),
        (["trainer.optim=adamm"], ConfigError, "The trainer section was refused"),
        (["data.path=nothing.jsonl"], DataError, "nothing.jsonl"),
        (["data={loader: 'no_such_rows:load'}"], DataError, "there is no module no_such_rows"),
        (["data={loader: 'json:lod'}"], DataError, "json has no function lod"),
        (["data={loader: 'textwrap:dedent'}"], DataError, r"takes \(text\)\..* def dedent\(config, tokenizer\)"),
        (["trainer.output_dir=rows.jsonl"], SaveError, "cannot be written"),
        (["devices=63"], HardwareError, "63"),
        (["devices=[0]"], HardwareError, "names cuda:0, and this process sees no GPU.* add devices=cpu to"),
        (["devices=[0, 1]"], HardwareError, "add devices=cpu multi_gpu.num_processes=2 to the command"),
        (["multi_gpu.num_processes=2", "data.path=nothing.jsonl"], DataError, "nothing.jsonl"),
        (["multi_gpu.num_processes=2"], ConfigError, "2 ranks were asked for, and this process runs pytest"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(settings, overrides, error, says):
    with pytest.raises(error, match=says):
        run(settings(*overrides))


def test_one_gpu_is_not_that_of_several_ranks(settings, monkeypatch):
    from pantheraml.cli.train import check_devices

    with pytest.raises(HardwareError, match="this process sees no GPU"):
        check_devices(settings("devices=[0, 1]"), 2)  # ranks of torchrun, say
    monkeypatch.setattr("pantheraml.devices.inventory.num_gpus", lambda: 1)  # a rank may see its own alone
    with pytest.raises(ConfigError, match="devices names cuda:0 alone, and this is one of 2 ranks"):
        check_devices(settings("devices=[0]"), 2)
    check_devices(settings("devices=[0, 1]"), 2)
    check_devices(settings("devices=cpu"), 2)


@pytest.mark.promise("D4")
@pytest.mark.parametrize(
    ("body", "overrides", "says"),
    [
        ("[{'text': 'a'}]", [], "loader_results:load returned list"),
        (
            "Dataset.from_list([{'text': 'a'}])",
            ["data.eval_split=test"],
            "returned a data set without splits",
        ),
        ("DatasetDict(test=Dataset.from_list([{'text': 'a'}]))", [], "It returned 'test'"),
        (
            "Dataset.from_list([{'text': 'a'}])",
            ["trainer.eval_strategy=epoch"],
            "there are no evaluation rows",
        ),
    ],
)
def test_what_a_loader_may_not_return(settings, tokenizer, monkeypatch, body, overrides, says):
    from pantheraml.cli.rows import call_loader, find_loader

    config = settings("data={loader: 'loader_results:load'}", *overrides)
    source = f"from datasets import Dataset, DatasetDict\ndef load(data, tokenizer):\n    return {body}\n"
    Path("loader_results.py").write_text(source)
    monkeypatch.delitem(sys.modules, "loader_results", raising=False)
    monkeypatch.syspath_prepend(Path.cwd())
    with pytest.raises(DataError, match=says):
        call_loader(find_loader(config.data.loader), config, tokenizer)


def test_rows_are_cut_before_some_are_held_out(settings):
    from pantheraml.cli.rows import read_rows

    train, evaluation = read_rows(settings("data.max_rows=8", "data.validation_fraction=0.25"))
    assert (len(train), len(evaluation)) == (6, 2)
    train, evaluation = read_rows(settings("data.max_rows=500", "data.eval_path=rows.jsonl"))
    assert (len(train), len(evaluation)) == (12, 12)
    train, evaluation = read_rows(settings("data={use_debug_dataset: true, eval_split: validation}"))
    assert len(train) > len(evaluation) > 0


def test_a_module_missing_inside_a_loader_is_not_hidden(settings, tmp_path):
    from pantheraml.cli.rows import find_loader

    (tmp_path / "broken_rows.py").write_text("import no_such_package_for_rows\n")
    settings()
    with pytest.raises(ModuleNotFoundError, match="no_such_package_for_rows"):
        find_loader("broken_rows:load")
