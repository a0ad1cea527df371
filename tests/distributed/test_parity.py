"""The same training on 1, 2 and 4 ranks, with any accumulation: losses and gradient norms in float32."""

from __future__ import annotations

import functools

import pytest
import torch
from datasets import Dataset

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from tests import tiny
from tests.distributed.ranks import run_ranks

# 29 rows: uneven for every layout below.
ROWS = 29


def rows():
    """Ragged rows with masked prompts; one of them has a single label."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for index in range(ROWS):
        length = int(torch.randint(4, 28, (1,), generator=generator))
        ids = torch.randint(5, 400, (length,), generator=generator).tolist()
        masked = length - 1 if index == 7 else index % 3
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return Dataset.from_list(found)


def train(folder, output, per_device, accumulation, settings):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    config = MultiGPUConfig(batch_split=settings.get("batch_split", "even"))
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
        num_train_epochs=3, learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True,
        max_grad_norm=0.5,
        **{"logging_steps": 1, **{name: value for name, value in settings.items() if name != "batch_split"}},
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer, multi_gpu_config=config
    )
    ended = trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    figures = trainer.evaluate()
    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    return {
        "logs": [
            {
                name: entry[name]
                for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")
                if name in entry
            }
            for entry in logs
        ],
        "train_loss": ended.training_loss,
        "eval": {name: figures[name] for name in ("eval_loss", "eval_mean_token_accuracy")},
        "weights": [weight.numpy() for weight in weights],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@functools.cache
def reference(folder, output):
    return train(folder, output, 8, 1, {})


@pytest.mark.promise("B5")
@pytest.mark.parametrize(
    ("ranks", "per_device", "accumulation", "settings"),
    [
        (1, 2, 4, {}),
        (1, 4, 2, dict(merge_micro_batches=True)),
        (2, 4, 1, {}),
        (2, 1, 4, {}),
        (2, 2, 2, dict(merge_micro_batches=True)),
        (4, 2, 1, {}),
        pytest.param(4, 1, 2, {}, marks=pytest.mark.slow),
        (1, 3, 1, dict(global_batch_size=8)),
        (2, 3, 1, dict(global_batch_size=8, merge_micro_batches=True)),
        pytest.param(3, 2, 1, dict(global_batch_size=8), marks=pytest.mark.slow),
        (3, 1, 1, dict(global_batch_size=8)),
        pytest.param(2, 2, 2, dict(batch_split=(3, 1)), marks=pytest.mark.promise("B9")),
    ],
)
def test_any_number_of_ranks_trains_the_same(
    folder, tmp_path_factory, ranks, per_device, accumulation, settings
):
    output = tmp_path_factory.getbasetemp()
    want = reference(folder, output)
    assert len(want["logs"]) == 12
    found = run_ranks(ranks, train, folder, output, per_device, accumulation, settings)
    for one in found:
        for step, (mine, theirs) in enumerate(zip(one["logs"], want["logs"], strict=True)):
            for name in ("loss", "grad_norm", "entropy"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-7), (step, name)
            assert mine["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], abs=1e-6)
            assert mine["num_tokens"] == theirs["num_tokens"]
        assert one["eval"] == pytest.approx(want["eval"], rel=1e-5)
        for mine, theirs in zip(one["weights"], found[0]["weights"], strict=True):
            assert (mine == theirs).all()


def test_the_loss_of_a_run_counts_what_no_log_line_has(folder, tmp_path_factory):
    """On every rank, that of all of them: the last two of twelve steps are not logged."""
    output = tmp_path_factory.getbasetemp()
    found = run_ranks(2, train, folder, output, 4, 1, {"logging_steps": 5})
    want = reference(folder, output)["train_loss"]
    assert [one["train_loss"] for one in found] == [pytest.approx(want, rel=1e-6)] * 2


@pytest.mark.promise("B5")
@pytest.mark.parametrize(
    ("ranks", "accumulation", "merged"), [(1, 4, True), (2, 2, False), (2, 2, True), (4, 1, True)]
)
def test_routers_are_balanced_the_same(tmp_path_factory, mixture, ranks, accumulation, merged):
    """The loss of a mixture's routers is a mean over micro-batches, also where ranks have run out of rows."""
    folder, want = mixture
    settings = dict(router_aux_loss_coef=0.5, merge_micro_batches=merged)
    found = run_ranks(ranks, train, folder, tmp_path_factory.getbasetemp(), 2, accumulation, settings)
    for one in found:
        for step, (mine, theirs) in enumerate(zip(one["logs"], want["logs"], strict=True)):
            for name in ("loss", "grad_norm", "aux_loss"):
                assert mine[name] == pytest.approx(theirs[name], rel=3e-6, abs=1e-7), (step, name)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")
    settings = dict(router_aux_loss_coef=0.5, merge_micro_batches=False)
    want = train(folder, tmp_path_factory.getbasetemp(), 2, 4, settings)
    assert min(entry["aux_loss"] for entry in want["logs"]) > 0
    return folder, want
