"""DeepSpeed's ZeRO on two GPUs: fused layers, bf16 by autocast, offloading, and the adapter that is saved."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLTrainer,
    PantheraMLTrainingArguments,
    notebook_launch,
)
from pantheraml.devices import zero as zero_sizes
from pantheraml.devices.zero import BUCKET
from tests import tiny

pytest.importorskip("deepspeed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LENGTH, STEPS, RATE = 256, 4, 1e-3
# How far Adam moves a value at most, in steps whose rates fall to 0. A step's bound: rate times sqrt(sum(w^2 / u)),
# w and u the weights of the gradients so far in both moments: 1.01 in the fourth.
FARTHEST = 1.01 * sum(RATE * (STEPS - step) / STEPS for step in range(STEPS))
WIDE = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("wide"), "llama", **WIDE)


def train(folder, output, config, load):
    """Losses and gradient norms, the loss of an evaluation, and what was generated."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 400, (LENGTH - 16 * (i % 4),), generator=generator).tolist() for i in range(40)]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, use_multi_gpu=config, **load
    )
    if not load.get("full_finetuning"):
        model = FastLanguageModel.get_peft_model(model, r=8)
    args = PantheraMLTrainingArguments(
        output_dir=str(output / "run"), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="steps", save_steps=2, learning_rate=RATE, report_to="none", disable_tqdm=True,
        max_grad_norm=0.5,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows})
    trainer = PantheraMLTrainer(model, args, train_dataset=data, eval_dataset=data, tokenizer=tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    model.save_pretrained(output / "adapter")
    FastLanguageModel.for_inference(model)
    ids = torch.tensor([[5, 6, 7]], device=trainer.args.device)
    new = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist()
    logs = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
    assert type(trainer.model_wrapped).__name__ == (
        "DeepSpeedEngine" if config.strategy == "deepspeed" else "DistributedDataParallel"
    )
    return logs, before, new


LOADS = {
    "bf16": dict(load_in_16bit=True),
    "cut": dict(load_in_16bit=True),
    "4bit": dict(load_in_4bit=True),
    "full": dict(full_finetuning=True),
}
# What is loaded, stage, what is offloaded, and how near DDP's the first step is, and those after it. At stage 3 layers
# are not fused, and trained in full they are rounded otherwise at any stage. Where stage 2 cuts gradients, "cut",
# micro-batches are not merged, by which gradient norms were 1e-4 apart; gradients of other weights, added up by
# mistake, put them 1e-2 apart.
CASES = [
    ("bf16", 0, False, (2e-3, 2e-3)),
    ("bf16", 2, False, (2e-3, 2e-3)),
    ("bf16", 2, "optimizer", (2e-3, 2e-3)),
    ("cut", 2, False, (2e-3, 2e-3)),
    ("bf16", 3, False, (2e-2, 2e-2)),
    ("bf16", 3, True, (2e-2, 2e-2)),
    ("4bit", 2, False, (2e-3, 2e-3)),
    ("full", 2, False, (2e-2, 2e-2)),
    ("full", 3, True, (2e-2, 2e-2)),
]


def train_all(folder, output):
    """All cases in one start of the ranks, which takes longer than each of them."""
    found = {}
    for name, load in LOADS.items():
        found[name] = train(folder, output / name, MultiGPUConfig(strategy="ddp"), load)
    for name, stage, offload, _ in CASES:
        # Of this process, which ends with the runs; the adapter's gradients do not fit into such a one.
        zero_sizes.BUCKET = 100_000 if name == "cut" else BUCKET
        config = MultiGPUConfig(strategy="deepspeed", zero_stage=stage, cpu_offload=offload)
        found[name, stage, offload] = train(folder, output / f"{name}-{stage}-{offload}", config, LOADS[name])
    return found


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    return output, notebook_launch(train_all, folder, output, num_processes=2)


@pytest.mark.promise("B6")
@pytest.mark.parametrize(("name", "stage", "offload", "tolerance"), CASES)
def test_the_training_is_that_of_ddp(trained, name, stage, offload, tolerance):
    output, results = trained
    (found, before, new), (want, want_before, _) = results[name, stage, offload], results[name]
    assert before == pytest.approx(want_before, rel=tolerance[0])
    assert len(new[0]) == 9
    assert len(found) == STEPS
    for step, (mine, theirs) in enumerate(zip(found, want, strict=True)):
        assert mine == pytest.approx(theirs, rel=tolerance[step > 0]), (found, want)
    file = "adapter/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
    mine, theirs = load_file(output / f"{name}-{stage}-{offload}" / file), load_file(output / name / file)
    assert mine.keys() == theirs.keys() and mine
    apart = torch.cat([(value - theirs[key]).abs().flatten().float() for key, value in mine.items()])
    assert is_nearly_the_same(apart), apart.sort().values[:: max(1, len(apart) // 20)]


def is_nearly_the_same(apart):
    """Whether values are as near as rounding leaves them.

    Adam divides by the gradient's size: a value whose gradient is so small that rounding turns its sign goes the other
    way, and ends up to twice as far away as it has moved. Such values are few: on CPUs in bf16, beside DDP, 0.8 to
    2.7 % were a tenth of the rate apart, 0.01 to 0.03 % twice the rate. Training on other rows moves most of them.
    """
    return (
        apart.max() <= 2 * FARTHEST
        and (apart > FARTHEST).float().mean() <= 1e-3
        and (apart > RATE / 10).float().mean() <= 0.05
    )
