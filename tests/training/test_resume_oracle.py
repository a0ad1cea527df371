"""A run that was not interrupted is the truth: from each of its checkpoints, a resumed run is equal to it bit by bit.

Compared for every step after the checkpoint, in this order: the rows that it reads, the random numbers, weights and
optimizer after it, and then all figures of the log.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments
from pantheraml.training.rank_batches import FilledCollator
from pantheraml.training.sample_keys import EPOCH, SAMPLE
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows

# 29 rows are four steps of 8: step 3 is in the first epoch, 4 at its end, 6 in the second. 9 packed ones are three.
PLACES = {"map": (3, 4, 6), "stream": (3, 4, 6), "packed": (1, 3, 5)}
STEPS = 9
TIMES = ("tokens_per_second", "total_flos", "train_runtime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose attention drops: every step takes random numbers."""
    found = tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    config = json.loads((found / "config.json").read_text())
    (found / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return found


def digest(value) -> str:
    """Of tensors, arrays and what holds them, every bit counts."""
    found = hashlib.sha256()

    def add(one):
        if isinstance(one, torch.Tensor):
            one = one.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(one, np.ndarray):
            one = one.tobytes()
        elif isinstance(one, dict):
            one = [part for pair in one.items() for part in pair]
        if isinstance(one, list | tuple):
            for part in one:
                add(part)
        else:
            found.update(one if isinstance(one, bytes) else pickle.dumps(one))

    add(value)
    return found.hexdigest()[:16]


class Masking:
    """TRL's collator, of whose batches some tokens are put in place of others, at random."""

    def __init__(self, pad):
        self.collator = DataCollatorForLanguageModeling(pad_token_id=pad)

    def __call__(self, examples):
        batch = self.collator(examples)
        chance = torch.rand(batch["input_ids"].shape) + np.random.rand() / 9 + random.random() / 9
        batch["input_ids"][chance > 0.7] = 7
        return batch


class Witness(TrainerCallback):
    """What was so at the end of every step."""

    def __init__(self):
        self.batches, self.steps = [], {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.steps[state.global_step] = {
            "rows": self.batches.pop(),
            "random": digest([random.getstate(), np.random.get_state(), torch.get_rng_state()]),
            "weights": digest(weights),
            "optimizer": digest(optimizer.state_dict()),
        }


def train(folder, output, kind, resume=None, masks=False, **settings):
    """By step: digests, and the log's figures; ``masks``: with a collator that draws random numbers."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
    given = rows()
    if kind == "stream":
        given = given.to_iterable_dataset(num_shards=1).shuffle(seed=5, buffer_size=50)
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(per_device_train_batch_size=2, global_batch_size=3 if kind == "packed" else 8, learning_rate=1e-3),
            **dict(max_steps=STEPS, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True),
            **dict(max_grad_norm=0.5, warmup_steps=2, packing=kind == "packed"), **settings,
        },
    )  # fmt: skip
    own = dict(data_collator=Masking(tokenizer.pad_token_id)) if masks else {}
    trainer = PantheraMLDistributedTrainer(model, args, train_dataset=given, tokenizer=tokenizer, **own)
    witness, collect = Witness(), trainer.get_batch_samples
    trainer.add_callback(witness)

    def watched(*arguments):
        batches, number = collect(*arguments)
        witness.batches.append(digest([{**batch} for batch in batches]))
        return batches, number

    trainer.get_batch_samples = watched
    trainer.train(resume_from_checkpoint=resume)
    for entry in trainer.state.log_history:
        if entry["step"] in witness.steps and "grad_norm" in entry:
            witness.steps[entry["step"]]["log"] = {k: v for k, v in entry.items() if k not in TIMES}
    return witness.steps


@pytest.fixture(scope="module")
def truth(folder, tmp_path_factory):
    """The folder of an uninterrupted run that saved at every step, and its steps."""
    found = {}

    def get(kind):
        if kind not in found:
            output = tmp_path_factory.mktemp(kind)
            settings = dict(save_strategy="steps", save_steps=1, async_save=kind == "map")
            found[kind] = output, train(folder, output, kind, **settings)
        return found[kind]

    return get


def compare(found, truth, begin=0):
    assert list(found) == list(range(begin + 1, STEPS + 1))
    for part in ("rows", "random", "optimizer", "weights", "log"):  # what differs first says why
        for step in found:
            assert found[step][part] == truth[step][part], (part, step)


@pytest.mark.parametrize(("place", "workers"), [(0, 0), (0, 2), (1, 2), (2, 0)])
@pytest.mark.parametrize("kind", PLACES)
def test_a_resumed_run_is_the_run(folder, tmp_path, truth, kind, place, workers):
    """Read with other workers than before, too: they change nothing."""
    output, steps = truth(kind)
    begin = PLACES[kind][place]
    checkpoint = str(output / f"checkpoint-{begin}")
    found = train(folder, tmp_path, kind, checkpoint, dataloader_num_workers=workers)
    compare(found, steps, begin)


def test_saving_changes_nothing(folder, tmp_path, truth):
    compare(train(folder, tmp_path, "map"), truth("map")[1])


def test_two_ranks(folder, tmp_path):
    settings = dict(save_strategy="steps", save_steps=6, async_save=True)
    whole = run_ranks(2, partial(train, **settings), folder, tmp_path, "map")
    again = run_ranks(2, train, folder, tmp_path, "map", str(tmp_path / "checkpoint-6"))
    for mine, of_whole in zip(again, whole, strict=True):
        compare(mine, of_whole, 6)
    assert whole[0][1]["rows"] != whole[1][1]["rows"], "each has its own"


@pytest.mark.parametrize("kind", ["map", pytest.param("stream", marks=pytest.mark.slow)])
def test_what_a_collator_draws_follows_from_the_rows(folder, tmp_path, kind):
    whole = train(folder, tmp_path, kind, masks=True, save_strategy="steps", save_steps=3)
    rows_seen = {found["rows"] for found in whole.values()}
    assert len(rows_seen) == STEPS
    for place in (3, 6):
        checkpoint = str(tmp_path / f"checkpoint-{place}")
        found = train(folder, tmp_path, kind, checkpoint, masks=True, dataloader_num_workers=place // 6)
        compare(found, whole, place)


def test_a_collator_draws_others_for_other_rows_and_epochs(tmp_path):
    masking, row = Masking(0), {"input_ids": list(range(100, 200)), SAMPLE: 3, EPOCH: 0}
    filled = FilledCollator(masking, row, numbered=True, seed=1)

    def drawn(**values):
        return filled([row | values])["input_ids"].tolist()

    random.seed(5)
    before = random.getstate(), torch.get_rng_state()
    assert drawn() == drawn() != list(range(100, 200))
    assert len({str(drawn()), str(drawn(**{EPOCH: 1})), str(drawn(**{SAMPLE: 4}))}) == 3
    assert random.getstate() == before[0] and torch.get_rng_state().equal(before[1])
