"""The examples run as they are, and with a model and data of the user's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl import GRPOConfig

import pantheraml
from pantheraml.config.source import read_yaml
from pantheraml.training.head import needs_cpu_head
from pantheraml.training.rewards import get_reward_funcs
from tests import forked

ROOT = Path(__file__).parents[2]
# Trains nothing, and takes as long as all others: tests/doctor runs it.
CHECK = "verify_installation"
SCRIPTS = [script for script in sorted((ROOT / "examples").glob("*.py")) if script.stem != CHECK]
NEEDS_TRITON = ("06_preference_dpo",) if needs_cpu_head(torch.device("cpu")) else ()
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

QUESTIONS = [(f"What is {number} plus two?", f"It is {number + 2}.") for number in range(12)]
# What each script is given in a second run, after all ran without arguments in the same folder.
OWN = {
    "01_quickstart": ("outputs/full-finetuning/model", "rows.jsonl"),
    "02_qlora_4bit": ("outputs/full-finetuning/model", "rows.jsonl"),
    "03_full_finetuning": ("outputs/quickstart/merged", "rows.jsonl"),
    "04_chat_data": ("outputs/quickstart/merged", "conversations.jsonl"),
    "05_continued_pretraining": ("outputs/quickstart/merged", "book.txt"),
    "06_preference_dpo": ("outputs/chat/adapter", "pairs.jsonl"),
    "07_orpo": ("outputs/quickstart/merged", "pairs.jsonl"),
    "08_reward_model": ("outputs/quickstart/merged", "pairs.jsonl"),
    "09_save_merge_reload": ("outputs/quickstart/merged", None),
    "10_larger_than_a_gpu": ("outputs/quickstart/merged", "rows.jsonl"),
    "deepspeed_multi_gpu": ("outputs/quickstart/merged", "rows.jsonl"),
    "direct_trainer_usage": ("outputs/quickstart/merged", "rows.jsonl"),
    "existing_script": ("outputs/quickstart/merged", "rows.jsonl"),
    "grpo_arithmetic": ("outputs/quickstart/merged", None),
    "grpo_open_r1_multi_gpu": ("outputs/quickstart/merged", "rows.jsonl"),
    "multi_gpu_training": ("outputs/quickstart/merged", "rows.jsonl"),
}
FORMATS = {
    "rows.jsonl": lambda question, answer: {"instruction": question, "output": answer},
    "conversations.jsonl": lambda question, answer: {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    },
    "pairs.jsonl": lambda question, answer: {
        "prompt": question,
        "chosen": f" {answer}",
        "rejected": " No idea.",
    },
}


def write_data(folder: Path) -> None:
    for name, row in FORMATS.items():
        (folder / name).write_text("".join(json.dumps(row(*pair)) + "\n" for pair in QUESTIONS))
    (folder / "book.txt").write_text("".join(f"{question} {answer}\n" for question, answer in QUESTIONS))


def runs_of(name: str) -> list[dict]:
    """A run without arguments and one with everything given, both of two steps."""
    model, data = OWN[name]
    given = ["--model", model, "--output", f"second/{name}", *(["--data", data] if data else [])]
    script = str(ROOT / "examples" / f"{name}.py")
    return [
        {"script": script, "arguments": ["--max-steps", "2"], "printed": f"{name}.txt"},
        {"script": script, "arguments": ["--max-steps", "2", *given], "printed": f"{name}-own.txt"},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which every example has run twice."""
    folder = tmp_path_factory.mktemp("examples")
    write_data(folder)
    both = [runs_of(script.stem) for script in SCRIPTS if script.stem not in NEEDS_TRITON]
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_in_one_process.py"))],
        input=json.dumps([first for first, _ in both] + [second for _, second in both]),
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
        check=True,
        timeout=280,
    )
    return folder


@pytest.fixture
def printed(folder, request):
    """What the example of this test printed, without arguments; both runs must have ended well."""
    name = next(script.stem for script in SCRIPTS if request.node.name[5:].startswith(script.stem))
    if name in NEEDS_TRITON:
        pytest.skip("this TRL computes the head of its trainer in Triton only")
    texts = [(folder / run["printed"]).read_text(encoding="utf-8") for run in runs_of(name)]
    assert not [text for text in texts if "Traceback" in text], "\n".join(texts)
    return texts[0]


def is_adapter(folder: Path) -> bool:
    """Whether a trained adapter was saved: the second factors start at zero."""
    weights = load_file(folder / "adapter_model.safetensors")
    return all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_01_quickstart(folder, printed):
    for output in ("outputs/quickstart", "second/01_quickstart"):
        assert is_adapter(folder / output / "adapter")
        assert (folder / output / "merged" / "model.safetensors").is_file()
        state = json.loads((folder / output / "run/checkpoint-2/trainer_state.json").read_text())
        assert state["global_step"] == 2
    assert not (folder / "second/01_quickstart/base-model").exists()


def test_02_qlora_4bit(folder, printed):
    assert is_adapter(folder / "outputs/qlora/adapter")
    assert "Answer:" in printed
    assert "Answer:" in (folder / "02_qlora_4bit-own.txt").read_text()


def test_03_full_finetuning(folder, printed):
    before, after = re.search(r"unseen rows: ([\d.]+) before, ([\d.]+) after", printed).groups()
    assert float(after) < float(before)
    start, trained = (
        load_file(folder / "outputs/full-finetuning" / name / "model.safetensors")
        for name in ("base-model", "model")
    )
    assert start.keys() == trained.keys() and not any(torch.equal(start[key], trained[key]) for key in start)


def test_04_chat_data(folder, printed):
    assert is_adapter(folder / "outputs/chat/adapter")
    assert "documents packed" in printed and "ShareGPT" not in printed.split("training rows:")[0]
    assert re.search(r"<\|im_start\|>assistant\n‹[^‹›]+<\|im_end\|>›", printed)
    assert "<|im_start|>" in (folder / "outputs/chat/adapter/chat_template.jinja").read_text()


@pytest.mark.promise("F11")
def test_05_continued_pretraining(folder, printed):
    start, trained = (
        load_file(folder / "outputs/continued-pretraining" / name / "model.safetensors")
        for name in ("base-model", "merged")
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not torch.equal(start[name].to(torch.bfloat16), trained[name])


def test_06_preference_dpo(folder, printed):
    assert "rewards/margins" in printed
    for output in ("outputs/dpo", "second/06_preference_dpo"):
        assert is_adapter(folder / output / "adapter")
        assert not (folder / output / "adapter/ref").exists()


def test_07_orpo(folder, printed):
    assert "'train_loss': '" in printed
    assert is_adapter(folder / "outputs/orpo/adapter") and is_adapter(folder / "second/07_orpo/adapter")


def test_08_reward_model(folder, printed):
    assert len(re.findall(r"^score [+-][\d.]+: ", printed, re.MULTILINE)) == 2
    config = json.loads((folder / "outputs/reward/merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_09_save_merge_reload(folder, printed):
    found = re.findall(r"^(\S+): ([\d.]+) MB .* at most ([\d.]+)$", printed, re.MULTILINE)
    sizes = {name: float(size) for name, size, _ in found}
    distances = {name: float(distance) for name, _, distance in found}
    assert sizes["adapter"] < sizes["merged-4bit"] < sizes["merged-16bit"]
    assert (
        distances["adapter"] < 1e-6 and distances["merged-16bit"] < 1e-4 and distances["merged-4bit"] < 1e-2
    )


def test_10_larger_than_a_gpu(folder, printed):
    assert is_adapter(folder / "outputs/split/adapter") and is_adapter(
        folder / "second/10_larger_than_a_gpu/adapter"
    )
    assert "16 rows a step" in printed


@pytest.mark.promise("A14")
def test_multi_gpu_training(folder, printed):
    assert " x 1 = 8 rows a step" in printed and "starting" not in printed
    assert (folder / "outputs/multi-gpu/adapter/adapter_model.safetensors").is_file()


@pytest.mark.promise("A14")
def test_the_multi_gpu_example_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    script = ROOT / "examples/multi_gpu_training.py"
    code, out, err = forked.run(script, "--max-steps", "2", "--num-processes", "2", "--advanced", seconds=200)
    assert code == 0, err
    assert err.count("2 x 4 x 2 = 16 rows a step") == 1 and "cpu_1" in err
    assert out.count("2 ranks trained") == 1
    assert (tmp_path / "outputs/multi-gpu/adapter/adapter_model.safetensors").is_file()


@pytest.mark.promise("C1")
def test_existing_script(folder, printed):
    assert "Trained on 1 ranks, by SFTTrainer." in printed
    assert is_adapter(folder / "outputs/existing-script/adapter") and is_adapter(
        folder / "second/existing_script/adapter"
    )


def test_grpo_arithmetic_saves_what_it_trained(folder, printed):
    assert re.search(r"^reward 0\.\d\d", printed, re.MULTILINE)
    assert (folder / "outputs/grpo-arithmetic/model/model.safetensors").is_file()
    assert (folder / "second/grpo_arithmetic/model/adapter_model.safetensors").is_file()


@pytest.mark.promise("C2")
def test_the_reward_of_the_grpo_example_rises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    code, out, err = forked.run(ROOT / "examples/grpo_arithmetic.py", "--max-steps", "80", seconds=200)
    assert code == 0, err
    first, *_, last = [float(line.split()[1]) for line in out.splitlines() if line.startswith("reward ")]
    assert first < 0.2 and last > first + 0.4


@pytest.mark.promise("C2")
def test_grpo_open_r1_multi_gpu(folder, printed):
    assert "'rewards/cosine/mean': " in printed and "'rewards/reasoning_steps/mean': " in printed
    for output in ("outputs/grpo-open-r1", "second/grpo_open_r1_multi_gpu"):
        assert (folder / output / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.promise("C2")
def test_the_recipe_of_the_guide_is_one_for_grpo():
    recipe = read_yaml(ROOT / "examples/configs/grpo_open_r1_config.yaml").data
    own = ["model_name_or_path", "max_seq_length", "load_in_4bit", "lora_r", "dataset_name", "reward_funcs"]
    assert [name for name in recipe if name not in {field.name for field in fields(GRPOConfig)}] == own
    names = ["accuracy", "format", "reasoning_steps", "cosine", "repetition_penalty", "length"]
    assert recipe["reward_funcs"] == names and len(get_reward_funcs(names)) == 6
    settings = {name: value for name, value in recipe.items() if name not in own}
    pantheraml.enable_grpo_support()
    try:
        args = GRPOConfig("outputs", bf16=False, **settings)
    finally:
        pantheraml.disable_grpo_support()
    assert (args.vllm_mode, args.generation_batch_size, args.num_generations) == ("server", 8, 8)


@pytest.mark.promise("C3")
@pytest.mark.slow
def test_direct_trainer_usage_on_two_ranks(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/direct_trainer_usage.py"), "--max-steps", "3", "--num-gpus", "2"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("starting 2 ranks of this script") == 1
    epochs = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [(one["epoch"], one["steps"], one["rows"]) for one in epochs] == [(1, 3, 20), (2, 3, 20)]
    assert epochs[1]["loss"] < epochs[0]["loss"]
    assert is_adapter(tmp_path / "outputs/direct/adapter")


@pytest.mark.promise("A14")
@pytest.mark.slow
def test_the_multi_gpu_example_by_accelerate(tmp_path):
    """With every flag of its docstring."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision=bf16"]
    launch += ["--num_processes=2", "--num_machines=1", "--dynamo_backend=no", "--main_process_port=0"]
    run = subprocess.run(
        [*launch, str(ROOT / "examples/multi_gpu_training.py"), "--max-steps", "2", "--advanced"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "DistributedType.MULTI_CPU" in run.stdout and "Mixed precision type: bf16" in run.stdout
    assert run.stderr.count("are trained in bf16; ") == 1
    assert (tmp_path / "outputs/multi-gpu/adapter/adapter_model.safetensors").is_file()


def test_an_example_runs_as_it_is_typed(tmp_path):
    """In a process and a folder of its own, with the command of its docstring."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/01_quickstart.py"), "--max-steps", "1"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Saved the merged model (bfloat16) to outputs/quickstart/merged." in run.stderr
    assert (tmp_path / "outputs/quickstart/merged/config.json").is_file()


def test_examples_are_short_and_listed():
    listed = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert [script.stem for script in SCRIPTS] == list(OWN)
    for script in (*SCRIPTS, ROOT / f"examples/{CHECK}.py"):
        source = script.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 80, script.name
        assert f"    python examples/{script.name}\n" in source.split('"""')[1], script.name
        assert f"[{script.name}]({script.name})" in listed
