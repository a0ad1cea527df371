"""The methods that models get: they save whole folders or nothing, as the models' own methods would."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import types

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pantheraml.errors import SaveError
from pantheraml.export.model_methods import save_pretrained, save_pretrained_merged
from tests import tiny
from tests.export.models import adapted, assert_same, logits
from tests.small_disk import small_disk

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("quantized", [False, True])
def test_a_transformers_model_saves_itself(quantized, tmp_path):
    tiny.save_checkpoint(tmp_path / "base", "llama", intermediate_size=128)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantized else None
    model = load(tmp_path / "base", quantization_config=nf4)
    save_pretrained(model, tmp_path / "out", tiny.build_tokenizer(), max_shard_size="100KB")
    assert_same(load(tmp_path / "out").state_dict(), model.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHATML


def test_a_peft_model_saves_its_adapter(llama, tmp_path):
    model = adapted(load(llama))
    save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "pantheraml.json").exists()
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load(llama), tmp_path / "out")), logits(model), rtol=0, atol=0
    )


def test_a_given_state_is_what_is_saved(llama, tmp_path):
    model = load(llama)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_pretrained(model, tmp_path / "out", state_dict=state)
    assert all(not tensor.any() for tensor in load(tmp_path / "out").state_dict().values())


def test_bound_as_a_method_it_survives_copying(llama, tmp_path):
    model = adapted(load(llama))
    model.save_pretrained = types.MethodType(save_pretrained, model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    twin.save_pretrained(tmp_path / "twin")
    again = PeftModel.from_pretrained(load(llama), tmp_path / "twin")
    assert not any(weight.any() for name, weight in again.named_parameters() if "lora_" in name)


def test_other_ranks_write_nothing(llama, tmp_path):
    save_pretrained(load(llama), tmp_path / "out", is_main_process=False)
    save_pretrained(adapted(load(llama)), tmp_path / "peft", is_main_process=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class Killer:
    def save_pretrained(self, folder):  # where the tokenizer is saved, after all weights are written
        if len(list(folder.glob("model-*.safetensors"))) > 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_saving_the_old_model_loads(llama, tmp_path):
    model = adapted(load(llama))
    save_pretrained_merged(model, tmp_path / "out", dtype="float32")
    child = multiprocessing.get_context("fork").Process(
        target=save_pretrained_merged, args=(load(llama), tmp_path / "out", Killer()),
        kwargs=dict(max_shard_size="100KB"),
    )  # fmt: skip
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2
    save_pretrained(model, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_disk_that_is_too_small_is_found_before_merging(llama, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "700k"):
        model = adapted(load(llama))
        save_pretrained_merged(model, disk / "model")
        before = sorted((path.name, path.stat().st_size) for path in (disk / "model").iterdir())
        with pytest.raises(SaveError, match=r"needs [56]\d\d\.\d kB and") as caught:
            save_pretrained_merged(model, disk / "model", dtype="float32")
        assert "untouched" in caught.value.need
        assert sorted((path.name, path.stat().st_size) for path in (disk / "model").iterdir()) == before
        assert load(disk / "model").dtype == torch.bfloat16
