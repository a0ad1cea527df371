"""Models split over several GPUs: the numbers of one GPU, limits kept as measured, and all that a trainer does."""

from __future__ import annotations

import pytest
import torch

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from pantheraml.devices.memory import GIB
from pantheraml.distributed.pipeline import step
from pantheraml.distributed.pipeline.link import Link
from pantheraml.models.state import get_state
from tests import tiny
from tests.distributed.pipelined import count_micro_batches
from tests.distributed.test_parity import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
LAYERS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(family)``: a checkpoint of four layers."""
    found = {}

    def get(family):
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            found[family] = tiny.save_checkpoint(folder, family, num_hidden_layers=LAYERS)
        return found[family]

    return get


def load(folder, device_map, **flags):
    flags = {"load_in_4bit": False, "dtype": "float32"} | flags
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, device_map=device_map, **flags
    )
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


def train(folder, output, device_map, *, config=None, flags=None, **settings):
    model, tokenizer = load(folder, device_map, **flags or {})
    args = PantheraMLTrainingArguments(
        output_dir=str(output), num_train_epochs=2, learning_rate=1e-3, logging_steps=1, report_to="none",
        disable_tqdm=True, max_grad_norm=0.5,
        **{
            "save_strategy": "no", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "bf16": False, "fp16": False,
        } | settings,
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer, multi_gpu_config=config
    )
    trainer.train()
    return trainer


def logs_of(trainer):
    names = ("loss", "grad_norm", "entropy", "num_tokens")
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.fixture
def calls(monkeypatch):
    """The numbers of micro-batches of each pipelined step."""
    return count_micro_batches(monkeypatch)


@pytest.mark.promise("A6")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_split_trains_as_one_gpu_does(folders, tmp_path, family, calls):
    whole = train(folders(family), tmp_path / "one", "cuda:0")
    assert not calls
    split = train(folders(family), tmp_path / "split", "balanced")
    assert calls and {p.device.index for p in split.model.parameters()} >= {0, 1}
    for mine, theirs in zip(logs_of(split), logs_of(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    assert split.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-5)
    ids = torch.arange(5, 29, device="cuda:0")[None]
    texts = [
        FastLanguageModel.for_inference(trainer.model).generate(
            input_ids=ids, max_new_tokens=8, do_sample=False
        )
        for trainer in (split, whole)
    ]
    assert torch.equal(*texts)


@pytest.mark.promise("A2")
@pytest.mark.parametrize("flags", [dict(load_in_4bit=True, dtype="bfloat16"), dict(kernels="off")])
def test_other_weights(folders, tmp_path, flags, calls):
    whole = train(folders("llama"), tmp_path / "one", "cuda:0", flags=flags)
    split = train(folders("llama"), tmp_path / "split", "balanced", flags=flags)
    assert calls
    for mine, theirs in zip(logs_of(split), logs_of(whole), strict=True):
        assert mine[:3] == pytest.approx(theirs[:3], rel=2e-2 if "dtype" in flags else 2e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(folders, tmp_path, precision, calls):
    flags = {precision: True}
    whole = train(folders("llama"), tmp_path / "one", "cuda:0", **flags)
    split = train(folders("llama"), tmp_path / "split", "balanced", **flags)
    assert calls
    for mine, theirs in zip(logs_of(split), logs_of(whole), strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=5e-2)


@pytest.mark.parametrize("policy", [True, "offload"])
def test_recompute_on_every_stage(folders, tmp_path, policy, calls):
    whole = train(folders("llama"), tmp_path / "one", "cuda:0")
    split = train(
        folders("llama"), tmp_path / "split", "balanced", flags=dict(use_gradient_checkpointing=policy)
    )
    state = get_state(split.model)
    assert calls and sum(plan.layers for plan in state.plans) == LAYERS and len(state.plans) == 2
    assert policy is True or set(state.stores) == {torch.device("cuda", 0), torch.device("cuda", 1)}
    for mine, theirs in zip(logs_of(split), logs_of(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("settings", [{}, dict(padding_free=True)])
def test_the_host_waits_for_no_gpu_within_a_step(folders, tmp_path, monkeypatch, settings):
    run, seen = step.Pipeline.step, []

    def watched(self, *args, **kwargs):
        seen.append(1)
        # The first step compiles kernels and tries attention backends.
        torch.cuda.set_sync_debug_mode("error" if len(seen) > 1 else "default")
        try:
            return run(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step.Pipeline, "step", watched)
    rows_at_a_time = dict(per_device_train_batch_size=1, gradient_accumulation_steps=8) if settings else {}
    train(folders("llama"), tmp_path, "balanced", bf16=True, **rows_at_a_time, **settings)
    assert len(seen) > 2


def test_a_loss_that_is_not_plain_goes_stage_by_stage(folders, tmp_path, calls):
    whole = train(folders("llama"), tmp_path / "one", "cuda:0", loss_type="dft")
    split = train(folders("llama"), tmp_path / "split", "balanced", loss_type="dft")
    assert not calls
    for mine, theirs in zip(logs_of(split), logs_of(whole), strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=2e-5, abs=1e-6)


def test_saved_merged_resumed(folders, tmp_path):
    whole = train(folders("llama"), tmp_path / "one", "cuda:0")
    split = train(folders("llama"), tmp_path / "split", "balanced", save_strategy="steps", save_steps=4)
    split.model.save_pretrained_merged(
        str(tmp_path / "merged"), split.processing_class, save_method="merged_16bit"
    )
    merged, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "merged"), max_seq_length=64, load_in_4bit=False, device_map="balanced"
    )
    assert len({p.device for p in merged.parameters()}) == 2
    again = train(folders("llama"), tmp_path / "again", "balanced", max_steps=1)
    again.args.max_steps = -1
    again.train(resume_from_checkpoint=str(tmp_path / "split" / "checkpoint-4"))
    for mine, theirs in zip(logs_of(again)[-4:], logs_of(whole)[-4:], strict=True):
        assert mine[:3] == pytest.approx(theirs[:3], rel=2e-5, abs=1e-6)


def test_a_tied_head_lies_with_the_embedding(folders, tmp_path, calls):
    trainer = train(folders("gemma3_text"), tmp_path, "balanced")
    base = trainer.model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight and calls
    assert base.lm_head.weight.device.index == torch.cuda.device_count() - 1


@pytest.mark.promise("A2", "A6")
def test_limits_hold_as_measured(tmp_path):
    """Four layers of 0.4 GiB: each GPU is given less than the model takes."""
    folder = tiny.save_checkpoint(
        tmp_path / "wide", "llama", num_hidden_layers=4, hidden_size=4096, intermediate_size=11008,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    limit = int(2.6 * GIB)
    for index in (0, 1):
        torch.cuda.reset_peak_memory_stats(index)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=64,
        load_in_16bit=True,
        device_map="balanced",
        max_memory={0: limit, 1: limit},
    )
    try:
        model = FastLanguageModel.get_peft_model(model, r=8)
        args = PantheraMLTrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=3, report_to="none",
            save_strategy="no",
        )  # fmt: skip
        PantheraMLDistributedTrainer(
            model,
            args,
            train_dataset=rows(),
            tokenizer=tokenizer,
            multi_gpu_config=MultiGPUConfig(micro_batches=8),
        ).train()
        for index in (0, 1):
            peak = torch.cuda.max_memory_reserved(index)
            assert 0.5 * GIB < peak <= limit, f"{peak / GIB} GiB on GPU {index}"
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * GIB, dtype=torch.uint8, device="cuda:1")
    finally:
        for index in (0, 1):
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def test_a_link_waits_for_what_it_copies_and_nobody_waits_for_it():
    there, back = (
        Link(*(torch.device("cuda", i) for i in (0, 1))),
        Link(*(torch.device("cuda", i) for i in (1, 0))),
    )
    torch.cuda._sleep(int(1e8))
    tensor = torch.full((1024, 1024), 3.0, device="cuda:0").sin()
    with torch.cuda.device(1):
        busy = torch.randn(4096, 4096, device="cuda:1")
        for _ in range(20):
            busy = busy @ busy * 1e-3
    parcel = there.send(tensor)
    want = tensor.clone()
    del tensor
    torch.empty(1024, 1024, device="cuda:0").fill_(7.0)
    moved = parcel.open()
    assert moved.device.index == 1 and torch.equal(moved.cpu(), want.cpu())
    assert torch.equal(back.send(moved * 2).open(), want * 2)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "qwen3", "mixtral"])
def test_a_model_computes_on_its_own_gpu_whichever_is_current(folders, family, mask):
    model, _ = load(folders(family), "cuda:0")
    ids = torch.randint(5, 400, (2, 24), generator=torch.Generator().manual_seed(1)).to("cuda:0")
    real = torch.ones_like(ids)
    real[1, 15:] = 0

    def step(current):
        model.zero_grad()
        torch.cuda.synchronize(0)
        with torch.cuda.device(0):
            torch.cuda._sleep(10**9)  # what ran on another GPU's stream would read what is not there yet
        with torch.cuda.device(current):
            loss = model(input_ids=ids, attention_mask=real if mask else None, labels=ids).loss
            loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for one, other in zip(step(1), step(0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
