"""DeepSpeed's ZeRO on two gloo ranks: the training of one process, saved whole, gone on with."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from pantheraml import FastLanguageModel, MultiGPUConfig, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.distributed.strategies import zero_settings
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.distributed.strategies.deepspeed import DeepSpeed
from pantheraml.errors import CheckpointError, ConfigError, NonFiniteError
from pantheraml.models.families import find_family
from pantheraml.models.fused import apply_layers
from pantheraml.models.fused.attention import apply_attention
from pantheraml.models.patching import PatchSet
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows
from tests.export.gguf_files import assert_same_model

deepspeed = pytest.importorskip("deepspeed")
with (
    warnings.catch_warnings()
):  # once here rather than by every rank: what DeepSpeed imports when its engine is made
    warnings.simplefilter("ignore")
    import_module("torch._inductor.compile_fx")
    import_module("deepspeed.runtime.zero.stage3")
    import_module("deepspeed.runtime.superoffload.superoffload_stage3")

pytestmark = [
    # torch 2.13 has a newer name for what DeepSpeed calls.
    pytest.mark.filterwarnings(
        "ignore:`torch.distributed.all_gather_into_tensor` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings(
        "ignore:`torch.distributed.reduce_scatter_tensor` is deprecated:FutureWarning"
    ),
]

PROMPT = [[5, 6, 7]]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """Ranks without GPUs would reduce through shared memory, by an extension that takes 40 s to build."""
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def zero(stage, **settings):
    return MultiGPUConfig(strategy="deepspeed", zero_stage=stage, **settings)


def build(folder, output, config, load=None, **settings):
    load = load or dict(load_in_4bit=False)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, device_map="cpu", use_multi_gpu=config, **load
    )
    if not load.get("full_finetuning"):
        model = FastLanguageModel.get_peft_model(model, r=4)
    args = PantheraMLTrainingArguments(
        output_dir=str(output / "run"),
        **{
            **dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, learning_rate=1e-3),
            **dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, max_grad_norm=0.5),
            **settings,
        },
    )  # fmt: skip
    return PantheraMLTrainer(model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer)


def logs_of(trainer):
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [(entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in logs]


def train(folder, output, config, load=None, **settings):
    trainer = build(folder, output, config, load, **settings)
    trainer.train()
    return logs_of(trainer), trainer.evaluate()["eval_loss"], type(trainer.model_wrapped).__name__


@functools.cache
def of_one_process(folder, output, full):
    load = dict(full_finetuning=True) if full else None
    return train(folder, output, None, load, per_device_train_batch_size=8, gradient_accumulation_steps=1)


@pytest.mark.promise("B6")
@pytest.mark.parametrize(
    ("stage", "per_device", "accumulation", "offload", "full"),
    [
        (0, 2, 2, False, False),
        (1, 1, 4, "optimizer", False),
        (2, 1, 4, True, True),
        (3, 2, 2, True, False),
        slow(2, 4, 1, False, False),
        slow(3, 4, 1, False, True),
        slow(3, 1, 4, "optimizer", True),
    ],
)
def test_the_training_is_that_of_one_process(
    folder, tmp_path_factory, stage, per_device, accumulation, offload, full
):
    output, load = tmp_path_factory.getbasetemp(), dict(full_finetuning=True) if full else None
    want, want_eval, _ = of_one_process(folder, output, full)
    run = functools.partial(
        train, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation
    )
    for logs, eval_loss, engine in run_ranks(2, run, folder, output, zero(stage, cpu_offload=offload), load):
        assert engine == "DeepSpeedEngine"
        assert eval_loss == pytest.approx(want_eval, rel=1e-6)
        for mine, theirs in zip(logs, want, strict=True):
            assert mine == pytest.approx(theirs, rel=3e-6)


def whole_run(folder, output, config, resume=None):
    """All that a script does, and the way back: evaluates, trains, saves in all ways, generates."""
    trainer = build(folder, output, config, save_strategy="steps", save_steps=3)
    model, tokenizer = trainer.model, trainer.processing_class
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume)
    model.save_pretrained(output / "adapter")
    model.save_pretrained_merged(output / "merged", tokenizer, dtype="float32")
    model.save_pretrained_gguf(output / "gguf", tokenizer, "f32")
    trainer.save_model(output / "model")
    model.eval()
    new = model.generate(input_ids=torch.tensor(PROMPT), max_new_tokens=4, do_sample=False)
    after = trainer.evaluate()["eval_loss"]
    return logs_of(trainer), (before, after), new.tolist(), os.environ.get("ACCELERATE_USE_DEEPSPEED")


@pytest.fixture(scope="module")
def by_ddp(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("ddp")
    found, other = run_ranks(2, whole_run, folder, output, MultiGPUConfig(strategy="ddp"))
    assert found == other, "evaluating first leaves the model to DDP"
    return output, found


@pytest.mark.promise("B6")
@pytest.mark.parametrize("stage", [3, slow(0), slow(1), slow(2)])
def test_what_is_saved_is_whole_and_gone_on_with(folder, tmp_path, by_ddp, stage):
    ddp, (want_logs, want_eval, want_new, _) = by_ddp
    logs, evals, new, left_over = run_ranks(2, whole_run, folder, tmp_path, zero(stage))[0]
    assert left_over is None, "later trainers of the process are no DeepSpeed's"
    assert evals == pytest.approx(want_eval, rel=1e-6) and new == want_new
    for mine, theirs in zip(logs, want_logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert_same_model(tmp_path / "gguf/model-F32.gguf", tmp_path / "merged")
    names = [f"{place}/adapter_model.safetensors" for place in ("adapter", "model", "run/checkpoint-3")]
    for name in (*names, "merged/model.safetensors"):
        mine, theirs = load_file(tmp_path / name), load_file(ddp / name)
        assert mine.keys() == theirs.keys() and mine
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-6, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor(PROMPT)
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    checkpoint = tmp_path / "run/checkpoint-3"
    again = run_ranks(2, whole_run, folder, tmp_path / "again", zero(stage), str(checkpoint))[0]
    assert again[0][-2:] == logs[-2:] and again[1][1] == evals[1], "bit by bit"


def test_weights_leave_the_stacks_of_fused_layers():
    """An evaluation moved them there; the engine sends each around as its bytes, and NCCL takes no gaps."""
    model = tiny.build_model("llama")
    apply_layers(model, find_family(model.config), PatchSet(), on_cpu=True)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        adapted(**model.dummy_inputs, use_cache=False)
    assert not all(parameter.is_contiguous() for parameter in adapted.parameters())
    strategy = DeepSpeed(MultiGPUConfig(strategy="deepspeed"))
    assert strategy.wrap(None, adapted) is adapted
    assert all(parameter.is_contiguous() for parameter in adapted.parameters())


def test_checkpoints_of_others_are_refused(tmp_path):
    part = tmp_path / "deepspeed/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    part.parent.mkdir(parents=True)
    part.touch()
    (tmp_path / "other").mkdir()
    strategy = DeepSpeed(zero(2))
    with pytest.raises(CheckpointError, match="was not saved by DeepSpeed"):
        strategy.check_checkpoint(tmp_path / "other")
    strategy.check_checkpoint(part.parents[1])  # of one rank, which this is
    part.with_name("zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(CheckpointError, match="on 2 ranks, and this run has 1"):
        strategy.check_checkpoint(part.parents[1])
    with pytest.raises(CheckpointError, match="was saved by DeepSpeed"):
        Strategy(MultiGPUConfig()).check_checkpoint(part.parents[1])


def refusal_of(kind, function, *arguments):
    with pytest.raises(kind) as caught:
        function(*arguments)
    return str(caught.value)


class Poison(TrainerCallback):
    """The loss of the third step is not finite on rank 1; remembers the weights after each step."""

    def __init__(self, trainer):
        self.weights, self._compute = [], trainer.compute_loss
        trainer.compute_loss = functools.partial(self.compute, trainer)
        trainer.add_callback(self)

    def compute(self, trainer, *arguments, **named):
        loss = self._compute(*arguments, **named)
        return loss * torch.nan if trainer.state.global_step == 2 and trainer.args.process_index else loss

    def on_step_end(self, *_, model, **__):
        weights = [
            getattr(p, "ds_tensor", p).detach().flatten().clone()
            for p in model.parameters()
            if p.requires_grad
        ]
        self.weights.append(torch.cat(weights).tolist())


def poisoned(folder, output, config, policy):
    trainer = build(folder, output, config, on_non_finite=policy)
    poison, error = Poison(trainer), ""
    try:
        trainer.train()
    except NonFiniteError as raised:
        error = str(raised)
    return logs_of(trainer), poison.weights, error


@pytest.mark.parametrize(
    ("stage", "policy"),
    [(0, "stop"), (2, "skip"), slow(0, "skip"), slow(1, "stop"), slow(3, "skip"), slow(3, "stop")],
)
def test_what_is_not_finite_reaches_no_weights(folder, tmp_path, stage, policy):
    for logs, weights, error in run_ranks(2, poisoned, folder, tmp_path, zero(stage), policy):
        assert weights[2] == weights[1] != weights[0]
        if policy == "stop":
            assert "loss of step 3 is nan for rows" in error and len(weights) == 3
        else:
            assert not error and weights[3] != weights[2]
            assert [rate for _, _, rate in logs] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


def bf16_run(folder, output, config, load):
    trainer = build(folder, output, config, load, bf16=True)
    trainer.train()
    dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    return logs_of(trainer), dtypes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "load", "tolerance"),
    [
        (1, dict(load_in_16bit=True), 1e-6),
        (2, dict(load_in_4bit=True), 1e-6),
        (2, dict(load_in_8bit=True), 1e-6),
        (3, dict(load_in_16bit=True), 2e-3),  # attention is torch's, which rounds otherwise
    ],
)
def test_bf16_keeps_trained_weights_in_float32(folder, tmp_path, stage, load, tolerance):
    want, _ = run_ranks(2, bf16_run, folder, tmp_path, MultiGPUConfig(strategy="ddp"), load)[0]
    logs, dtypes = run_ranks(2, bf16_run, folder, tmp_path, zero(stage), load)[0]
    assert dtypes == {"torch.float32"}
    for mine, theirs in zip(logs, want, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)


def given_settings(folder, output, config, stage):
    """DeepSpeed's own settings in the arguments, as for transformers."""
    settings = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_optimization": {"stage": stage},
    }  # fmt: skip
    trainer = build(folder, output, config, dict(load_in_4bit=False, kernels="off"), deepspeed=settings)
    trainer.train()
    trainer.save_model(output / "model")
    return logs_of(trainer), trainer._strategy.describe()


@pytest.mark.promise("B6")
def test_settings_of_deepspeed_in_the_arguments_count(folder, tmp_path):
    want, _, _ = of_one_process(folder, tmp_path, False)
    for logs, said in run_ranks(2, given_settings, folder, tmp_path, None, 3):
        assert said.startswith("DeepSpeed ZeRO-3: optimizer, gradients and weights shared out")
        for mine, theirs in zip(logs, want, strict=True):
            assert mine == pytest.approx(theirs, rel=3e-6)
    sizes = {
        name: value.numel() for name, value in load_file(tmp_path / "model/adapter_model.safetensors").items()
    }
    assert len(sizes) == 28 and min(sizes.values()) > 0
    assert json.loads((tmp_path / "model/pantheraml.json").read_text())["base_model"]["values"]
    for config, says in (
        (zero(2), "DeepSpeed was started on with stage 3"),
        (MultiGPUConfig(strategy="ddp"), "Leave strategy out"),
    ):
        refused = run_ranks(2, refusal_of, ConfigError, given_settings, folder, tmp_path, config, 3)
        assert all(says in one for one in refused)


def of_arguments(folder, output, multi_gpu_strategy):
    trainer = build(folder, output, None, multi_gpu_strategy=multi_gpu_strategy)
    return trainer._strategy.describe()


def test_what_cannot_be_is_refused_before_weights_load(folder, tmp_path):
    said = run_ranks(2, of_arguments, folder, tmp_path, "deepspeed")[0]
    assert said.startswith("DeepSpeed ZeRO-2: optimizer and gradients shared out")
    for load, feature in ((dict(load_in_4bit=True), "4-bit"), (dict(load_in_8bit=True), "8-bit")):
        refused = run_ranks(2, refusal_of, ConfigError, build, folder, tmp_path, zero(3), load)
        assert all(f"{feature} weights and zero_stage=3" in one and "zero_stage=2" in one for one in refused)
    restoring = functools.partial(build, on_non_finite="restore", save_strategy="steps")
    refused = run_ranks(2, refusal_of, ConfigError, restoring, folder, tmp_path, zero(2))
    assert all('on_non_finite="skip"' in one for one in refused)
    refused = run_ranks(
        2, refusal_of, ConfigError, functools.partial(build, fp16=True), folder, tmp_path, zero(0)
    )
    assert all("zero_stage=1" in one for one in refused)
    assert (
        "one process" in refusal_of(ConfigError, build, folder, tmp_path, zero(2, cpu_offload=True)).lower()
    )


@pytest.mark.promise("B6")
@pytest.mark.slow
def test_accelerate_launch_takes_the_guides_file(tmp_path):
    root = Path(__file__).parents[2]
    examples = root / "examples"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(examples / "ds_config.yaml"),
        "--num_processes", "2", str(examples / "deepspeed_multi_gpu.py"), "--max-steps", "2", "--output", str(tmp_path),
    ]  # fmt: skip
    # What is compiled is built by ninja, which is beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "DeepSpeed ZeRO-2: optimizer and gradients shared out" in done.stdout + done.stderr
    assert (
        min(value.numel() for value in load_file(tmp_path / "adapter/adapter_model.safetensors").values()) > 0
    )


def train_in_two_ways(folder, output, config):
    """Fused layers, and batches with padding on one rank while there is none on the other: what came of it, and whether
    that was so.
    """
    trainer = build(folder, output, config, merge_micro_batches=False, gradient_accumulation_steps=1)
    model, family = trainer.model, find_family(trainer.model.config)
    apply_layers(model.get_base_model(), family, PatchSet(), on_cpu=True)
    apply_attention(model, family, PatchSet())
    padded = []

    def note(module, args, kwargs):
        padded.append(kwargs.get("attention_mask") is not None)

    model.get_submodule("base_model.model.model.layers.0").register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return logs_of(trainer), padded, [p.detach().clone() for p in model.parameters() if p.requires_grad]


def train_both_in_two_ways(folder, output):
    return [
        train_in_two_ways(folder, output / name, config)
        for name, config in {"ddp": MultiGPUConfig(strategy="ddp"), "zero": zero(2)}.items()
    ]


def test_gradients_that_come_in_two_orders_are_those_of_their_weights(tmp_path, monkeypatch):
    """Where it cuts them, DeepSpeed sums what comes first on one rank with what comes first on the other."""
    monkeypatch.setattr(zero_settings, "waits_whole", lambda *_, **__: False)
    lengths = [16, 16, 16, 20]
    generator = torch.Generator().manual_seed(5)
    data = [torch.randint(5, 400, (lengths[i % 4],), generator=generator).tolist() for i in range(32)]
    monkeypatch.setattr(f"{__name__}.rows", lambda: Dataset.from_dict({"input_ids": data}))
    folder = tiny.save_checkpoint(tmp_path / "llama", "llama")
    ranks = run_ranks(2, train_both_in_two_ways, folder, tmp_path)
    (want, padded, weights), (found, _, others) = ranks[0]
    assert padded != ranks[1][0][1], "one rank's batch has padding where the other's has none"
    assert found == [pytest.approx(one, rel=1e-5) for one in want]
    for mine, theirs in zip(others, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
