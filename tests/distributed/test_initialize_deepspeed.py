"""``initialize_distributed`` for DeepSpeed on two gloo ranks, as its arguments or accelerate launch say."""

from __future__ import annotations

import os

import pytest

from pantheraml import initialize_distributed
from pantheraml.errors import ConfigError
from tests.distributed.ranks import run_ranks
from tests.distributed.test_deepspeed import nothing_is_compiled, pytestmark  # noqa: F401
from tests.distributed.test_initialize import arguments, build, in_every_order, loss_of


def as_launched(folder, output):
    """As ``accelerate launch --config_file ds_config.yaml`` starts ranks; the script says what that says."""
    os.environ.update(
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="1",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2", ACCELERATE_GRADIENT_CLIPPING="1.0", ACCELERATE_MIXED_PRECISION="no",
    )  # fmt: skip
    args = arguments(output, multi_gpu_strategy="deepspeed", gradient_accumulation_steps=2)
    accelerator = initialize_distributed("deepspeed", args=args)
    with pytest.raises(ConfigError, match="zero_stage=2; an earlier call says 1"):
        initialize_distributed("deepspeed", zero_stage=2)
    trainer = build(folder, args)
    assert vars(accelerator.state) is vars(trainer.accelerator.state)
    assert accelerator.deepspeed_plugin.zero_stage == 1 and os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert accelerator.gradient_accumulation_steps == 1
    return trainer._strategy.describe(), loss_of(trainer)


@pytest.mark.promise("B2")
def test_deepspeed_in_every_order(llama, tmp_path):
    _, (plain, *_) = run_ranks(2, in_every_order, llama, tmp_path, "ddp")[0]
    for seen, losses in run_ranks(2, in_every_order, llama, tmp_path, "deepspeed", 1):
        assert seen == [("DistributedType.DEEPSPEED", 2, "no")] * 4
        assert losses[0] == losses[1] == losses[2]
        assert losses[0][0] == pytest.approx(plain[0], rel=3e-6)


@pytest.mark.promise("B2")
def test_deepspeed_as_launched(llama, tmp_path):
    for said, losses in run_ranks(2, as_launched, llama, tmp_path):
        assert said.startswith("DeepSpeed ZeRO-1") and len(losses) == 1
