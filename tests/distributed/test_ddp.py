"""Gradients are reduced, and in what dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from pantheraml.distributed.data_parallel import average_buckets
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def train(folder, output, reduce_dtype, evaluate_first=False):
    """The gradients of one step, the same on all ranks."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=4, max_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, max_grad_norm=0,
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), tokenizer=tokenizer, callbacks=[seen := Gradients()],
        multi_gpu_config=MultiGPUConfig(reduce_dtype=reduce_dtype), eval_dataset=rows(),
    )  # fmt: skip
    if evaluate_first:
        trainer.evaluate()
    trainer.train()
    return seen.found.numpy()


def train_all(folder, output, runs):
    return [train(folder, output, *run) for run in runs]


def test_lora_gradients_are_reduced_in_the_dtype_that_was_asked_for(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "model", "llama")
    found, dtypes = {}, (None, "float32", "bfloat16")
    ranks = run_ranks(2, train_all, folder, tmp_path, [(dtype,) for dtype in dtypes])
    for dtype, *gradients in zip(dtypes, *ranks, strict=True):
        one, other = map(torch.from_numpy, gradients)
        assert torch.equal(one, other)
        found[dtype] = one
    exact, rounded = found[None], found["bfloat16"]
    assert torch.equal(found["float32"], exact)
    assert not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(rounded, rounded.bfloat16().float()), "16 bits went over the wire"
    assert (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.promise("D5")
def test_evaluating_first_leaves_the_model_to_ddp(tmp_path):
    """accelerate takes a model that was evaluated for prepared, and would not wrap it for training."""
    folder = tiny.save_checkpoint(tmp_path / "model", "llama")
    for want, found in run_ranks(2, train_all, folder, tmp_path, [(None,), (None, True)]):
        assert (found == want).all()


def average(dtype):
    """The gradients of weights in bf16, and those of each rank alone."""
    torch.manual_seed(dist.get_rank())
    mine = torch.randn(1, 4096).bfloat16()
    model = DistributedDataParallel(nn.Linear(4096, 1, bias=False, dtype=torch.bfloat16))
    if dtype is not None:
        average_buckets(model, dtype)
    model(mine).sum().backward()
    return model.module.weight.grad.float().numpy(), mine.float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_weights_in_16_bits_can_be_reduced_exactly(dtype):
    found = run_ranks(3, average, dtype)
    exact = torch.from_numpy(sum(mine for _, mine in found) / 3).bfloat16().float()
    off = (torch.from_numpy(found[0][0]) != exact).float().mean()
    # A mean in 32 bits is rounded once (ties may fall to the other side), one in 16 bits on its way, too.
    assert off < 0.02 if dtype is torch.float32 else off > 0.1
