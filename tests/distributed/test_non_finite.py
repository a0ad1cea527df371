"""A loss or gradient that is not finite never reaches the weights, and is told by its rows."""

from __future__ import annotations

import math
import shutil
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import ConfigError, NonFiniteError
from pantheraml.models.state import get_state
from pantheraml.training.non_finite import findings, named
from pantheraml.training.step_record import Step
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_pipeline import split_at
from tests.training.starving import Starved
from tests.training.test_checkpoints import build

MARKER = 401  # a token whose embedding a test makes NaN
STEPS = 8


def rows(bad=()):
    """48 ragged rows; those numbered in ``bad`` hold the marker."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for index in range(48):
        length = int(torch.randint(6, 20, (1,), generator=generator))
        ids = torch.randint(5, 400, (length,), generator=generator).tolist()
        found.append({"input_ids": [*ids[:3], MARKER, *ids[4:]] if index in bad else ids})
    return Dataset.from_list(found)


class Only(TrainerCallback):
    """Drops the gradients of some steps: what a run is that leaves these out."""

    def __init__(self, left_out):
        self.left_out = left_out

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.left_out:
            model.zero_grad()


class Kept(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = [p.detach().numpy().copy() for p in model.parameters() if p.requires_grad]
        self.weights[state.global_step] = np.concatenate([one.ravel() for one in trained])


class Run(NamedTuple):
    """Logs, weights after each step, numbers of the rows of each step by micro-batch on this rank, and how it ended."""

    logs: list
    weights: dict
    rows: dict
    error: str


def run(
    folder,
    output,
    bad=(),
    left_out=(),
    in_gradient=False,
    stream=False,
    split=False,
    dropout=0.0,
    most=None,
    **settings,
):
    """A run of eight steps, whose rows ``bad`` are spoilt, or which leaves out some steps."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    get_state(model).split = split_at(0, 1, 2) if split else None
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=dropout)
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=3),
            **dict(save_strategy="no", report_to="none", disable_tqdm=True, max_steps=STEPS, max_grad_norm=1.0),
            **dict(warmup_steps=2, weight_decay=0.1), **settings,
        },
    )  # fmt: skip
    kept, given = Kept(), rows(bad)
    trainer = PantheraMLTrainer(
        model,
        args,
        train_dataset=given.to_iterable_dataset() if stream else given,
        tokenizer=tokenizer,
        callbacks=[kept, Only(left_out)],
    )
    spoil(model, in_gradient)
    if most is not None:
        Starved(model, most, backward=True)
    seen = {}
    collect = trainer.get_batch_samples

    def watched(*arguments):
        batches, number = collect(*arguments)
        seen[trainer.state.global_step + 1] = [
            batch["sample_numbers"].tolist() for batch in batches if "sample_numbers" in batch
        ]
        return batches, number

    trainer.get_batch_samples = watched
    try:
        trainer.train()
        error = ""
    except NonFiniteError as found:
        error = str(found)
    return Run(trainer.state.log_history, kept.weights, seen, error)


def spoil(model, in_gradient):
    """Let the marker's embedding be NaN, or the gradient of one weight where it is among the tokens."""
    is_bad = [False]

    def forward(module, inputs, output):
        marked = (inputs[0] == MARKER)[..., None]
        is_bad[0] = bool(marked.any())
        return output if in_gradient else output.masked_fill(marked, math.nan)

    model.get_input_embeddings().register_forward_hook(forward)
    first = next(p for p in model.parameters() if p.requires_grad)
    if in_gradient:
        first.register_hook(lambda gradient: gradient * math.nan if is_bad[0] else gradient)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def clean(folder, tmp_path_factory):
    """A run without anything bad in it, of which some steps are left out, by rank."""

    @cache
    def get(ranks, left_out=(), settings=()):
        output = tmp_path_factory.mktemp("clean")
        function = partial(run, left_out=left_out, **dict(settings))
        return run_ranks(ranks, function, folder, output)

    return get


def same(found, oracle, steps):
    return all(np.array_equal(found.weights[step], oracle.weights[step]) for step in steps)


NO_CLIPPING = dict(max_grad_norm=0.0)
OTHER = dict(optim="adamw_torch")  # which the host has to ask for


@pytest.mark.parametrize(
    ("in_gradient", "settings"),
    [(False, {}), (True, {}), (False, NO_CLIPPING), (True, OTHER | NO_CLIPPING), (False, OTHER)],
)
def test_a_step_is_left_out(folder, tmp_path, clean, caplog, in_gradient, settings):
    first, second = clean(1)[0].rows[4]
    with caplog.at_level("INFO", "pantheraml"):
        found = run(folder, tmp_path, (second[1],), in_gradient=in_gradient, on_non_finite="skip", **settings)
    assert same(found, clean(1, (4,), tuple(settings.items()))[0], range(1, STEPS + 1)), "bit by bit"
    if in_gradient:
        rows_of_step = ", ".join(map(str, sorted(first + second)))
        assert (
            f"The gradient of step 4 is not finite, and its loss is. Its rows: {rows_of_step}." in caplog.text
        )
    else:
        named = ", ".join(map(str, sorted(second)))
        assert f"The loss of step 4 is nan for rows {named}. The step is left out." in caplog.text


def test_a_step_that_memory_did_not_suffice_for_is_told_once(folder, tmp_path, clean, caplog):
    """Cut into single rows and repeated, and then left out: the row is named alone."""
    bad = clean(1)[0].rows[1][1][1]
    with caplog.at_level("INFO", "pantheraml"):
        found = run(folder, tmp_path, (bad,), on_non_finite="skip", most=20)
    assert "Step 1 ran out of memory on rank 0" in caplog.text
    assert caplog.text.count(f"The loss of step 1 is nan for rows {bad}. The step is left out.") == 1
    for step, weights in clean(1, (1,))[0].weights.items():
        np.testing.assert_allclose(found.weights[step], weights, rtol=1e-4, atol=1e-6)


def test_figures_are_those_of_the_other_steps(folder, tmp_path, clean):
    bad = clean(1)[0].rows[4][0][:1]
    steps = {entry["step"]: entry for entry in clean(1, (4,), (("logging_steps", 1),))[0].logs}
    found = run(folder, tmp_path, bad, on_non_finite="skip").logs
    assert [entry["step"] for entry in found] == [3, 6, STEPS]
    assert found[1]["loss"] == pytest.approx((steps[5]["loss"] + steps[6]["loss"]) / 2, rel=1e-6)
    assert found[1]["skipped_steps"] == 1 and "skipped_steps" not in found[0]
    assert found[1]["num_tokens"] == steps[6]["num_tokens"]
    assert found[1]["entropy"] == pytest.approx(6.2, abs=0.1) and math.isfinite(found[2]["train_loss"])
    alone = run(folder, tmp_path, bad, on_non_finite="skip", logging_steps=1).logs
    assert math.isnan(alone[3]["loss"]) and alone[4]["loss"] == pytest.approx(steps[5]["loss"], rel=1e-6)


def test_ranks_leave_it_out_together(folder, tmp_path, clean):
    """The loss of one rank alone is not finite; all have the weights of a run without that step."""
    settings = dict(on_non_finite="skip", max_grad_norm=0.5)
    bad = tuple(clean(2)[1].rows[4][1][:1])
    for found, oracle in zip(
        run_ranks(2, partial(run, **settings), folder, tmp_path, bad),
        clean(2, (4,), (("max_grad_norm", 0.5),)),
        strict=True,
    ):
        assert same(found, oracle, range(1, STEPS + 1))


@pytest.mark.parametrize("settings", [{}, OTHER])
def test_the_run_stops_on_all_ranks(folder, tmp_path, clean, settings):
    rows_of_pass = clean(2)[1].rows[4][0]
    named = ", ".join(map(str, sorted(rows_of_pass)))
    for found, oracle in zip(
        run_ranks(2, partial(run, **settings), folder, tmp_path, tuple(rows_of_pass[:1])),
        clean(2, (), tuple(settings.items())),
        strict=True,
    ):
        assert f"The loss of step 4 is nan for rows {named} (rank 1). The weights are as they" in found.error
        last = max(found.weights)
        assert last == (4 if settings else 6), "told at the log line, unless the host asks at every step"
        assert np.array_equal(found.weights[last], oracle.weights[3]), "nothing was updated since"


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_and_optimizer_go_back(folder, tmp_path, clean, ranks):
    """The checkpoint of step 3, told at step 6: what follows is a run that left out steps 4 to 6."""
    settings = dict(save_strategy="steps", save_steps=3, logging_steps=2, on_non_finite="restore")
    later = {row for one in clean(ranks) for step in (7, 8) for batch in one.rows[step] for row in batch}
    last = [row for batch in clean(ranks)[-1].rows[5] for row in batch if row not in later]
    for found, oracle in zip(
        run_ranks(ranks, partial(run, **settings), folder, tmp_path, last[-1:]),
        clean(ranks, (4, 5, 6)),
        strict=True,
    ):
        assert found.error == ""
        assert same(found, oracle, (1, 2, 3, 7, 8)), "moments and learning rates included"
        assert [entry["skipped_steps"] for entry in found.logs if "skipped_steps" in entry] == [3, 3]


def test_there_has_to_be_a_checkpoint(folder, tmp_path, clean):
    settings = dict(save_strategy="steps", on_non_finite="restore")
    shutil.copytree(saved(folder, tmp_path), tmp_path / "run" / "checkpoint-2")  # of another run
    bad = clean(1)[0].rows[2][0][:1]
    found = run(folder, tmp_path / "run", bad, save_steps=4, **settings)
    assert "this run has saved none yet" in found.error
    # Every row is bad behind the first steps: the third return to one checkpoint would be of no use, either.
    bad = {row for step in range(4, 9) for batch in clean(1)[0].rows[step] for row in batch}
    found = run(folder, tmp_path / "again", bad, save_steps=3, logging_steps=1, **settings)
    assert "The loss of step 6" in found.error and "return number 3 to" in found.error


def saved(folder, tmp_path):
    run(folder, tmp_path / "other", save_strategy="steps", save_steps=2, max_steps=2)
    return tmp_path / "other" / "checkpoint-2"


def test_a_run_that_trains_nothing_ends(folder, tmp_path):
    found = run(folder, tmp_path, range(48), on_non_finite="skip", max_steps=12)
    assert "The loss of step 10 is nan" in found.error and "10 steps in a row" in found.error


@pytest.mark.parametrize("settings", [dict(merge_micro_batches=True), dict(lora_dropout=0.2)])
def test_rows_keep_their_numbers(folder, tmp_path, clean, settings):
    """In one pass for several micro-batches, and beside the keys that dropout follows."""
    dropout = settings.pop("lora_dropout", 0.0)
    first, second = clean(1)[0].rows[4]
    found = run(folder, tmp_path, first[:1], dropout=dropout, **settings)
    named = ", ".join(map(str, sorted(first + second if settings else first)))
    assert f"The loss of step 4 is nan for rows {named}." in found.error


def test_stages_of_a_split_model(folder, tmp_path, clean, caplog):
    """The last micro-batch brings all of a step through the stages, so that all of its rows are named."""
    first, second = clean(1)[0].rows[4]
    with caplog.at_level("INFO", "pantheraml"):
        found = run(folder, tmp_path, first[:1], split=True, on_non_finite="skip")
    assert same(found, run(folder, tmp_path, left_out=(4,), split=True), range(1, STEPS + 1))
    named = ", ".join(map(str, sorted(first + second)))
    assert f"The loss of step 4 is nan for rows {named}. The step is left out." in caplog.text


def test_rows_of_a_stream(folder, tmp_path):
    """Six to a step here: row 16 of the stream is in the second micro-batch of the third."""
    found = run(folder, tmp_path, (16,), stream=True, per_device_train_batch_size=3)
    assert "The loss of step 3 is nan for rows 15, 16, 17." in found.error


def test_a_loss_taints_its_gradient(folder, tmp_path):
    """Also one that nothing but a constant makes infinite; where a scaler takes the steps, those that follow too."""
    trainer = build(folder, tmp_path)

    def gradient(constant):
        weight = torch.tensor(3.0, requires_grad=True)
        trainer.tainting(2 * weight + constant).backward()
        return weight.grad.item()

    assert math.isnan(gradient(math.inf)) and gradient(1.0) == 2.0
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert gradient(1.0) == 2.0 and math.isnan(gradient(math.nan)) and math.isnan(gradient(1.0))
    trainer.args.on_non_finite = "skip"
    assert gradient(1.0) == 2.0


def test_what_a_scaler_leaves_out_is_its_own_business():
    """In fp16: an overflow at a large scale is no finding; a loss is one, and an overflow at scale 1."""
    steps = [
        Step(1, [([3, 4], 2.0)], math.inf, 65536.0),
        Step(2, [([5], math.nan), ([6], 1.0)], math.nan, 32768.0),
        Step(3, [([7], 2.0)], math.inf, 1.0),
        Step(4, [([8], 2.0)], 1.0, 1.0),
    ]
    assert [str(found) for found in findings(steps)] == [
        "The loss of step 2 is nan for rows 5.",
        "The gradient of step 3 is not finite, and its loss is. Its rows: 7.",
    ]
    steps[0].scale = None
    assert [found.number for found in findings(steps)] == [1, 2, 3]


def test_many_rows_are_not_all_named():
    assert named(range(100)).startswith("0, 1, 2") and named(range(100)).endswith("62, 63 and 36 more")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(on_non_finite="ignore"), "on_non_finite='ignore' was given"),
        (dict(on_non_finite="restore", save_strategy="no"), 'save_strategy="no" were given'),
        (dict(on_non_finite="restore", save_only_model=True), "save_only_model=True were given"),
    ],
)
def test_policies(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        PantheraMLTrainingArguments(output_dir=str(tmp_path), **settings)
