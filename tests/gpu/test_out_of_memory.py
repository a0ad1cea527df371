"""Real limits of memory on a GPU: a run that does not fit trains what one does that has all of it."""

from __future__ import annotations

import gc
from contextlib import suppress

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLTrainer,
    PantheraMLTrainingArguments,
    get_rank,
    notebook_launch,
)
from pantheraml.errors import HardwareError
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LENGTH, STEPS = 1024, 3
WIDE = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, max_position_embeddings=LENGTH)

# What DeepSpeed shares out: its stage, and settings of its own. A layer of 2.6 million weights has several buckets.
BUCKETS = dict(
    train_batch_size="auto", train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto",
    gradient_clipping="auto", zero_optimization=dict(stage=2, reduce_bucket_size=1_000_000),
)  # fmt: skip
DEEPSPEED = {
    "optimizer": (2, {}),
    "gradients": (2, dict(deepspeed=BUCKETS)),
    "weights": (3, {}),
    "all": (3, {}),
}
FULL = ("trained", "gradients", "all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("wide"), "llama", **WIDE)


def build(folder, output, shared=None, **settings):
    """A trainer in float32 that keeps all activations: about 1 GiB for the 8,192 tokens of a micro-batch.

    Args:
        folder: of the model.
        output: of the run.
        shared: what ranks share out: "frozen" layers beside an adapter, or all, "trained" and computed in bf16; or
            the "computing" of each layer; or by DeepSpeed the "optimizer" or frozen "weights" beside an adapter,
            "gradients" of all weights in small buckets, or "all".
        settings: of the trainer.
    """
    config = None
    if shared == "computing":
        config = MultiGPUConfig(tensor_parallel=2)
    elif shared in DEEPSPEED:
        stage, given = DEEPSPEED[shared]
        config, settings = MultiGPUConfig(strategy="deepspeed", zero_stage=stage), settings | given
    elif shared:
        config = MultiGPUConfig(strategy="fsdp", shard_frozen=True)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 400, (LENGTH - 64 * (i % 4),), generator=generator).tolist() for i in range(48)]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=LENGTH,
        load_in_4bit=False,
        dtype="float32",
        full_finetuning=shared in FULL,
        use_multi_gpu=config,
        use_gradient_checkpointing=False,
    )
    if shared not in FULL:
        model = FastLanguageModel.get_peft_model(
            model, r=8, lora_dropout=0.2, use_gradient_checkpointing=False
        )
    args = PantheraMLTrainingArguments(
        output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=8, global_batch_size=16,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, bf16=shared == "trained",
        **settings,
    )  # fmt: skip
    return PantheraMLTrainer(
        model, args, train_dataset=Dataset.from_dict({"input_ids": rows}), tokenizer=tokenizer
    )


class Limit(TrainerCallback):
    """Lets the allocator have little more than it has, from where the run has been planned.

    Args:
        more: bytes; None for no limit, 0 for not even what is free in blocks.
    """

    def __init__(self, more):
        self.more, self.before, self.ballast = more, 0, []

    def on_train_begin(self, *_, **__):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_reserved()
        if self.more is not None:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction((self.before + self.more) / total)

        if self.more == 0:
            self.fill()

    def fill(self):
        """Take what is free in the allocator's blocks: they may hold a row's activations."""
        for size in (2**25, 2**22, 2**20):
            with suppress(torch.OutOfMemoryError):
                while True:
                    self.ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    def taken(self):
        """Bytes that training took beside what was there before."""
        return torch.cuda.max_memory_reserved() - self.before


def train(folder, output, more=None, **settings):
    """Losses and gradient norms, the most tokens of a pass, and the bytes that training took; see ``Limit``."""
    trainer, limit = build(folder, output, **settings), Limit(more)
    trainer.add_callback(limit)
    try:
        trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in logs], trainer._limit.most, limit.taken()


def assert_same(found, wanted, tolerance=2e-4):
    assert len(found) == len(wanted) == STEPS
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("merge", [False, True])
def test_the_losses_are_those_without_a_limit(folder, tmp_path, merge):
    wanted, limit, taken = train(folder, tmp_path, merge_micro_batches=merge)
    assert limit > 10**9
    found, limit, _ = train(folder, tmp_path, 0.4 * taken, merge_micro_batches=merge)
    assert_same(found, wanted)
    assert limit <= LENGTH * (8 if merge else 4), "it did run out of memory"


def test_nothing_is_left_to_reduce(folder, tmp_path):
    with pytest.raises(HardwareError, match="nothing is left to reduce") as caught:
        train(folder, tmp_path, 0)
    assert " saves " in str(caught.value)
    # All that was computed has been let go of: the same process can train.
    assert len(train(folder, tmp_path)[0]) == STEPS


def train_on_a_rank(folder, output, taken, shared):
    """On the second rank memory is short."""
    more = 0.4 * taken if taken and get_rank() == 1 else None
    return train(folder, output, more, shared=shared, merge_micro_batches=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("shared", [None, "frozen", "trained", "computing", *DEEPSPEED])
def test_one_rank_of_two(folder, tmp_path, shared):
    if shared in DEEPSPEED:
        pytest.importorskip("deepspeed")
    wanted, _, taken = notebook_launch(train_on_a_rank, folder, tmp_path, 0, shared, num_processes=2)
    found, limit, _ = notebook_launch(train_on_a_rank, folder, tmp_path, taken, shared, num_processes=2)
    assert_same(found, wanted, 2e-2 if shared == "trained" else 2e-4)
    assert limit <= LENGTH * 4, "both take less"
