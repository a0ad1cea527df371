"""What a run saves is whole, pointed to and kept; what is damaged is never gone on with."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset

from pantheraml import FastLanguageModel, MultiGPUConfig, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.checkpoint.manifest import problems, read_manifest
from pantheraml.checkpoint.pointers import read_pointer
from pantheraml.checkpoint.run_record import read_totals
from pantheraml.errors import CheckpointError
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_out_of_memory import Said

ROWS = Dataset.from_list([{"input_ids": list(range(5, 17 + index % 5))} for index in range(24)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def build(folder, output, kind=PantheraMLTrainer, full=False, **settings):
    """A trainer of an adapter; ``full``: of all weights, which ranks share out."""
    spread = dict(use_multi_gpu=MultiGPUConfig(strategy="fsdp")) if full else dict(device_map="cpu")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), 64, load_in_4bit=False, full_finetuning=full, **spread
    )
    model = model if full else FastLanguageModel.get_peft_model(model, r=2)
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(per_device_train_batch_size=2, max_steps=6, save_strategy="steps", save_steps=2, logging_steps=1),
            **dict(learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=True), **settings,
        },
    )  # fmt: skip
    return kind(model, args, train_dataset=ROWS, eval_dataset=ROWS, tokenizer=tokenizer)


def train(folder, output, **settings):
    trainer = build(folder, output, **settings)
    trainer.train()
    return trainer


def names(output):
    return sorted(path.name for path in output.iterdir() if path.name != "README.md")


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry}


def test_checkpoints_are_whole_and_the_last_one_is_named(folder, tmp_path, caplog):
    train(folder, tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "latest.json"]
    for step in (2, 4, 6):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert not problems(checkpoint)
        assert read_manifest(checkpoint).about["cursor"] == {
            "global_batch_size": 2,
            "epoch": 0,
            "rows": 2 * step,
        }
    assert read_pointer(tmp_path, "latest").checkpoint == "checkpoint-6"
    caplog.set_level("INFO", logger="pantheraml")
    build(folder, tmp_path).train(resume_from_checkpoint="auto")
    assert "all 6 steps of this run were done before" in caplog.text


def test_the_best_one_of_a_relative_folder_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = train(folder, "outputs", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    assert trainer.state.best_model_checkpoint == "outputs/checkpoint-6"
    assert read_pointer(tmp_path / "outputs", "best").checkpoint == "checkpoint-6"


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_one_is_named_and_kept(folder, tmp_path, limit):
    trainer = train(
        folder, tmp_path, eval_strategy="steps", eval_steps=2, save_total_limit=limit, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    best = read_pointer(tmp_path, "best")
    assert trainer.state.best_model_checkpoint == str(tmp_path / best.checkpoint)
    assert (
        best.value == pytest.approx(trainer.state.best_metric) and best.step == trainer.state.best_global_step
    )
    assert (tmp_path / best.checkpoint).is_dir() and not problems(tmp_path / best.checkpoint)
    assert best.checkpoint == "checkpoint-2", "the loss falls, so that the first one stays"
    kept = [name for name in names(tmp_path) if name.startswith("checkpoint-")]
    assert kept == (["checkpoint-2", "checkpoint-6"] if limit == 2 else ["checkpoint-2"])
    for name in kept:
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]) == tmp_path / "checkpoint-2"


def test_a_run_goes_on_with_the_newest_whole_one(folder, tmp_path, caplog):
    whole = losses(train(folder, tmp_path))
    flip(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    again = build(folder, tmp_path)
    with caplog.at_level("INFO", "pantheraml"):
        ended = again.train(resume_from_checkpoint=True)
    mean = sum(loss for step, loss in whole.items() if step > 2) / 4
    assert ended.training_loss == pytest.approx(mean, rel=1e-5), "of this start's steps"
    assert "checkpoint-6 is passed over" in caplog.text and "adapter_model.safetensors" in caplog.text
    assert "checkpoint-4 is passed over: optimizer.pt is missing" in caplog.text
    assert losses(again) == whole, "from step 3 on, bit by bit"
    assert not problems(tmp_path / "checkpoint-6"), "written anew"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_damage_is_refused(folder, tmp_path):
    train(folder, tmp_path, save_steps=3)
    for step in (3, 6):
        flip(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint-3.*optimizer\.pt"):
        build(folder, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*checkpoint-6.*checkpoint-3"):
        build(folder, tmp_path).train(resume_from_checkpoint=True)


def test_no_checkpoint_at_all(folder, tmp_path):
    trainer = build(folder, tmp_path)
    with pytest.raises(CheckpointError, match=r'has no checkpoint.*resume_from_checkpoint="auto"'):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"No trainer_state\.json.*a folder such as"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def on_ranks(folder, output, settings):
    trainer = build(folder, output, **settings)
    trainer.train(resume_from_checkpoint=settings.get("save_steps") == 3)
    return losses(trainer)


def test_ranks_save_one_checkpoint_and_agree_on_it(folder, tmp_path):
    first = run_ranks(2, on_ranks, folder, tmp_path, {})
    checkpoint = tmp_path / "checkpoint-6"
    assert {"rng_state_0.pth", "rng_state_1.pth", "cursor.json"} <= set(read_manifest(checkpoint).files)
    assert not problems(checkpoint)
    flip(checkpoint / "rng_state_1.pth")
    flip(tmp_path / "checkpoint-2" / "scheduler.pt")
    second = run_ranks(2, on_ranks, folder, tmp_path, dict(save_steps=3))
    for mine, theirs in zip(second, first, strict=True):
        assert mine == theirs


def test_a_checkpoint_says_what_its_run_was_told_and_came_to(folder, tmp_path, caplog):
    """Totals are those of all starts, whenever they are logged."""
    whole = train(folder, tmp_path / "whole", save_steps=3, logging_steps=4, hub_token="secret")
    trainer = build(folder, tmp_path / "again", save_steps=1, logging_steps=4)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").unlink()
    record = json.loads((checkpoint / "run.json").read_text())
    assert record["arguments"]["learning_rate"] == 1e-3 and record["arguments"]["seed"] == 42
    assert record["multi_gpu"]["backend"] == "nccl" and "secret" not in json.dumps(record)
    before = read_totals(checkpoint)
    lengths = [len(row["input_ids"]) for row in ROWS]
    assert before.tokens == pytest.approx(6 * sum(lengths) / len(lengths), abs=12) and before.seconds > 0
    record["totals"]["peak_allocated_gib"] = 3.5
    (checkpoint / "run.json").write_text(json.dumps(record))
    with caplog.at_level("INFO", "pantheraml"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    after, theirs = (read_totals(tmp_path / name / "checkpoint-6") for name in ("again", "whole"))
    assert after.tokens == theirs.tokens > before.tokens and after.seconds > before.seconds
    assert (before.peak_allocated_gib, after.peak_allocated_gib) == (None, 3.5)
    last = [trainer.state.log_history[-2]["num_tokens"], whole.state.log_history[-2]["num_tokens"]]
    assert last[0] == last[1], "the log's, too"
    assert "was saved with" not in caplog.text, "nobody knows"
    manifest = json.loads(text)
    assert manifest["libraries"]["torch"] == torch.__version__


def test_other_versions_are_said(folder, tmp_path, caplog, monkeypatch):
    train(folder, tmp_path, max_steps=2)
    monkeypatch.setattr("pantheraml.checkpoint.run_record.library_versions", lambda: {"torch": "9.9"})
    with caplog.at_level("INFO", "pantheraml"):
        build(folder, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert "checkpoint-2 was saved with python" in caplog.text
    assert f"torch {torch.__version__} (here 9.9)" in caplog.text


def on_machines(folder, output, settings, resume=None):
    """Two ranks on machines of their own, whose disks have the same folders with other things in them."""
    rank = dist.get_rank()
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    trainer = build(
        folder, output / f"machine-{rank}", **dict(global_batch_size=4, save_on_each_node=True) | settings
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses(trainer)


def on_machines_again(folder, output):
    """What ranks say that go on after each machine has lost a checkpoint, and what they come to; no one whole, then."""
    said, logger = Said(), logging.getLogger("pantheraml")
    logger.addHandler(said)
    found = on_machines(folder, output, dict(async_save=True), resume=True)
    if dist.get_rank() == 1:
        for checkpoint in (output / "machine-1").glob("checkpoint-*"):
            (checkpoint / "optimizer.pt").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        on_machines(folder, output, {}, resume=True)
    return said.lines, found


def test_machines_without_a_common_disk(folder, tmp_path):
    whole, other = run_ranks(2, on_machines, folder, tmp_path, dict(async_save=True))
    assert whole == other
    for machine, own in (("machine-0", "rng_state_0.pth"), ("machine-1", "rng_state_1.pth")):
        run = tmp_path / machine
        assert read_pointer(run, "latest").checkpoint == "checkpoint-6"
        for step in (2, 4, 6):
            assert not problems(run / f"checkpoint-{step}")
            assert [path.name for path in (run / f"checkpoint-{step}").glob("rng_state*")] == [own]
    flip(tmp_path / "machine-1" / "checkpoint-6" / "adapter_model.safetensors")
    (tmp_path / "machine-0" / "checkpoint-4" / "optimizer.pt").unlink()
    (said, found), (_, other) = run_ranks(2, on_machines_again, folder, tmp_path)
    assert found == other == whole, "from step 3 on, bit by bit"
    assert any("Rank 1: checkpoint-6 is passed over: adapter_model.safetensors" in line for line in said)
    assert any("checkpoint-6 is passed over: Another machine has no whole one" in line for line in said)
    assert any("checkpoint-4 is passed over: optimizer.pt is missing" in line for line in said)


def test_machines_without_a_common_disk_that_share_weights_out(folder, tmp_path):
    settings = dict(full=True, save_steps=3)
    whole, _ = run_ranks(2, on_machines, folder, tmp_path, settings)
    for machine in ("machine-0", "machine-1"):
        checkpoint = tmp_path / machine / "checkpoint-3"
        assert not problems(checkpoint)
        assert {"model.safetensors", "optimizer.pt"} <= set(read_manifest(checkpoint).files)
        flip(tmp_path / machine / "checkpoint-6" / "model.safetensors")
    assert run_ranks(2, on_machines, folder, tmp_path, settings, True) == [whole, whole]
