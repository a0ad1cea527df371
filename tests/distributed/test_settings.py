"""What each field of MultiGPUConfig does, on real ranks."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    barrier,
    get_rank,
    get_world_size,
    setup_multi_gpu,
)
from pantheraml.errors import ConfigError
from pantheraml.models.recompute import is_recomputing
from tests.distributed.ranks import run_ranks
from tests.launch.test_agent import run


def backend(config):
    setup_multi_gpu(config)
    return dist.get_backend(), get_world_size()


@pytest.mark.promise("A7")
@pytest.mark.parametrize("name", ["gloo", "nccl"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl is what it says where there are GPUs")
def test_backend_and_num_processes(name):
    config = MultiGPUConfig(backend=name, num_processes=2)
    assert run_ranks(2, backend, config, grouped=False) == [("gloo", 2)] * 2


def backend_that_torch_lacks():
    with pytest.raises(ConfigError, match="built without MPI"):
        backend(MultiGPUConfig(backend="mpi", num_processes=2))


@pytest.mark.promise("A7")
@pytest.mark.skipif(dist.is_mpi_available(), reason="this torch has MPI")
def test_a_backend_that_torch_lacks():
    run_ranks(2, backend_that_torch_lacks, grouped=False)


def wait_for_one_that_does_not_come(seconds):
    setup_multi_gpu(MultiGPUConfig(timeout_minutes=0.05))  # three seconds
    if get_rank() == 1:
        time.sleep(seconds)
        return None
    start = time.monotonic()
    try:
        barrier()
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    return None


@pytest.mark.promise("A7")
def test_timeout_minutes():
    waited, said = run_ranks(2, wait_for_one_that_does_not_come, 6, grouped=False)[0]
    assert 2.5 < waited < 6 and "imed out" in said


@pytest.mark.promise("A7", "B1")
@pytest.mark.parametrize("strategy", ["ddp", "none"])
def test_strategy(strategy):
    program = (
        "from pantheraml import MultiGPUConfig, get_world_size, setup_multi_gpu\n"
        f"setup_multi_gpu(MultiGPUConfig(num_processes=2, strategy={strategy!r}))\n"
        "import os; os.write(1, f'ranks {get_world_size()}\\n'.encode())\n"
    )
    code, out, err = run("-c", program)
    assert code == 0, err
    assert out.count("ranks 2" if strategy == "ddp" else "ranks 1") == (2 if strategy == "ddp" else 1)


def ask_for_others():
    with pytest.raises(ConfigError, match=r"num_processes=3.*one of 2 ranks that torchrun started"):
        setup_multi_gpu(MultiGPUConfig(num_processes=3))
    with pytest.raises(ConfigError, match=r"strategy='none'.*one of 2 ranks that torchrun started"):
        FastLanguageModel.from_pretrained("nothing", use_multi_gpu=MultiGPUConfig(strategy="none"))
    return True


def test_ranks_cannot_be_asked_to_be_another_number():
    assert run_ranks(2, ask_for_others) == [True, True]


def train(folder, output, config, skipped=False):
    """Two steps; the logged losses, whether layers recompute, and how often a layer's MLP ran in them."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", kernels="off"
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    if skipped:
        model.register_parameter("of_another_head", nn.Parameter(torch.zeros(3)))
    calls = []
    mlp = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(16)]})
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, max_steps=2, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows, tokenizer=tokenizer, multi_gpu_config=config
    )
    try:
        trainer.train()
    except ConfigError as error:
        return str(error), trainer.state.global_step
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, is_recomputing(model), len(calls)


@pytest.mark.promise("A7")
def test_find_unused_parameters(llama, tmp_path):
    """A trained weight that takes no part in the loss: named before any weight has moved."""
    for said, steps in run_ranks(2, train, llama, tmp_path, MultiGPUConfig(), True):
        assert "no gradient to trained weights: of_another_head." in said and steps == 0
        assert "Write MultiGPUConfig(find_unused_parameters=True)" in said
    config = MultiGPUConfig(find_unused_parameters=True)
    for losses, _, _ in run_ranks(2, train, llama, tmp_path, config, True):
        assert len(losses) == 2 and all(loss > 0 for loss in losses)


@pytest.mark.promise("A7")
def test_use_gradient_checkpointing(llama, tmp_path):
    with_it = run_ranks(2, train, llama, tmp_path, MultiGPUConfig(use_gradient_checkpointing=True))
    without = run_ranks(2, train, llama, tmp_path, MultiGPUConfig(use_gradient_checkpointing=False))
    for (losses, recomputes, calls), (same, not_then, fewer) in zip(with_it, without, strict=True):
        assert (recomputes, not_then) == (True, False)
        assert (calls, fewer) == (4, 2)
        assert losses == pytest.approx(same, rel=1e-6)
