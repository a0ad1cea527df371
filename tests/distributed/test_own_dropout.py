"""Dropout inside a model follows the sample: the same on any number of ranks, in any cut, and after a resume."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows
from tests.models import dropping

STEPS, SAVED = 4, 2
# Models of transformers' own, all of whose weights are trained, and adapters on ones that are loaded by us.
PLAIN = {"gpt2": {}, "opt": {}, "phi": dict(attn_implementation="eager")}
OURS = {
    "llama": dict(attention_dropout=0.2),
    "llama, eager": dict(attention_dropout=0.2),
    "phi3": dict(resid_pdrop=0.2, attention_dropout=0.1),
}
KINDS = (*PLAIN, *OURS)
SLOW = ("phi", "phi3", "llama, eager")
PACKED = dict(packing=True, max_length=64, per_device_train_batch_size=1, global_batch_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind in PLAIN:
        found[kind] = tmp_path_factory.mktemp(kind)
        dropping.build(kind).save_pretrained(found[kind])
        tiny.build_tokenizer().save_pretrained(found[kind])
    for kind, config in OURS.items():
        found[kind] = tiny.save_checkpoint(tmp_path_factory.mktemp(kind[:5]), kind.split(",")[0], **config)
    return found


def load(kind, folder, dropout):
    if kind in PLAIN:
        model = AutoModelForCausalLM.from_pretrained(folder, **PLAIN[kind])
        return model, tiny.build_tokenizer()
    how = dict(attn_implementation="eager") if "eager" in kind else {}
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", **how
    )
    return FastLanguageModel.get_peft_model(model, r=4, lora_dropout=dropout, random_state=1), tokenizer


def train(kind, folder, output, resume=None, dropout=0.2, **settings):
    """Loss and gradient norm of each step, 8 rows a step."""
    model, tokenizer = load(kind, folder, dropout)
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(per_device_train_batch_size=2, global_batch_size=8, learning_rate=1e-3, logging_steps=1),
            **dict(save_strategy="steps", save_steps=SAVED, report_to="none", disable_tqdm=True),
            **dict(max_steps=STEPS, use_cpu=True, gradient_checkpointing=False),
            **settings,
        },
    )  # fmt: skip
    trainer = PantheraMLTrainer(model, args, train_dataset=rows(), tokenizer=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in logs]


@pytest.fixture(scope="module")
def one(folders, tmp_path_factory):
    """One rank's runs, and the folders of their checkpoints."""
    found = {}

    def get(kind, **settings):
        key = kind, *settings.items()
        if key not in found:
            output = tmp_path_factory.mktemp("one")
            found[key] = train(kind, folders[kind], output, **settings), output / f"checkpoint-{SAVED}"
        return found[key]

    return get


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for step, (mine, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        assert mine == pytest.approx(theirs, rel=2e-6, abs=1e-7), step


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]
)
def test_cuts_and_recompute_drop_the_same(kind, folders, tmp_path, one):
    wanted = one(kind)[0]
    for settings in (
        dict(per_device_train_batch_size=1),
        dict(per_device_train_batch_size=4, gradient_checkpointing=True),
        *([dict(merge_micro_batches=True)] if kind in ("llama", "phi3") else []),
    ):
        assert_same(train(kind, folders[kind], tmp_path, **settings), wanted)


@pytest.mark.parametrize(
    "kinds", [("gpt2", "llama"), pytest.param(KINDS, marks=pytest.mark.slow)], ids=["two kinds", "all"]
)
def test_ranks_drop_the_same_and_go_on_as_one(folders, tmp_path, one, kinds):
    """Two ranks for all, which then save; one goes on from there, and two from what one has saved."""
    wanted = {kind: one(kind)[0] for kind in kinds}
    packed = {kind: one(kind, **PACKED)[0] for kind in ("gpt2", "llama")}
    checkpoints = {kind: one(kind)[1] for kind in ("gpt2", "llama")}
    for found, joined, gone_on in run_ranks(2, train_all, folders, tmp_path, kinds, checkpoints):
        for kind in kinds:
            assert_same(found[kind], wanted[kind])
        for kind, logs in packed.items():
            assert_same(joined[kind], logs)
            assert_same(gone_on[kind], wanted[kind])
    for kind in packed:
        resume = str(tmp_path / kind / f"checkpoint-{SAVED}")
        assert_same(train(kind, folders[kind], tmp_path / "on", resume=resume), wanted[kind])


def train_all(folders, output, kinds, checkpoints):
    found = {kind: train(kind, folders[kind], output / kind) for kind in kinds}
    packed = {kind: train(kind, folders[kind], output / "packed", **PACKED) for kind in checkpoints}
    gone_on = {
        kind: train(kind, folders[kind], output / "two", resume=str(checkpoint))
        for kind, checkpoint in checkpoints.items()
    }
    return found, packed, gone_on


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_does_drop_and_anew_in_every_step(kind, folders, tmp_path, one):
    wanted = one(kind)[0]
    other = train(kind, folders[kind], tmp_path, seed=7, data_seed=42)
    assert other[0][1] != pytest.approx(wanted[0][1], rel=1e-4)
