"""Adapters are saved with a record of their base model, and refused on any other."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pantheraml.errors import AdapterError
from pantheraml.export.adapter import check_adapter_matches, save_adapter
from tests import tiny
from tests.export.models import LINEAR, adapted, assert_same, logits, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def adapter(checkpoints, tmp_path_factory):
    """Folder of an adapter for the tiny Llama checkpoint, with a tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted(load(checkpoints("llama"))), folder, tiny.build_tokenizer())
    return folder


@pytest.mark.promise("F8")
def test_a_saved_adapter_gives_the_same_logits(llama, tmp_path):
    model = adapted(load(llama))
    before = snapshot(model)
    save_adapter(model, tmp_path / "out", tiny.build_tokenizer())
    assert_same(snapshot(model), before)
    again = PeftModel.from_pretrained(load(llama), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHATML
    assert not list((tmp_path / "out").glob("*.bin"))


def test_the_record_names_versions_and_base(adapter, llama):
    record = json.loads((adapter / "pantheraml.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"].keys() >= {"pantheraml", "transformers", "peft", "safetensors"}
    assert record["base_model"]["name"] == str(llama)
    assert record["base_model"]["architecture"] == "LlamaForCausalLM"
    assert record["base_model"]["sizes"]["num_hidden_layers"] == 2
    assert len(record["base_model"]["values"]["model.embed_tokens.weight"]) == 256


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    ],
    ids=["float32", "bfloat16", "float16", "4bit", "8bit"],
)
def test_the_base_is_known_again_in_any_precision(options, adapter, llama, tmp_path):
    base = load(llama, **options)
    check_adapter_matches(adapter, base)
    save_adapter(adapted(base), tmp_path / "out")  # and the other way round
    check_adapter_matches(tmp_path / "out", load(llama))


def test_the_base_is_known_again_under_an_adapter(adapter, llama, tmp_path):
    model = adapted(load(llama), modules_to_save=["embed_tokens", "norm"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(1.0)
    check_adapter_matches(adapter, model)
    save_adapter(model, tmp_path / "out")
    check_adapter_matches(tmp_path / "out", load(llama))


def test_other_weights_of_the_same_shape_are_refused(adapter, llama, tmp_path):
    tiny.save_checkpoint(tmp_path / "other", "llama", seed=1)
    with pytest.raises(AdapterError, match="other values in") as caught:
        check_adapter_matches(adapter, load(tmp_path / "other"))
    assert str(llama) in caught.value.got and str(tmp_path / "other") in caught.value.got
    assert f"Load {llama}" in caught.value.fix


def test_a_slightly_trained_relative_is_refused(adapter, llama):
    base = load(llama)
    with torch.no_grad():
        base.get_input_embeddings().weight[5, 7] *= 1.02
    with pytest.raises(AdapterError, match=r"other values in model\.embed_tokens\.weight"):
        check_adapter_matches(adapter, base)


def test_another_architecture_is_refused(adapter, checkpoints):
    with pytest.raises(AdapterError, match="Qwen3ForCausalLM instead of LlamaForCausalLM"):
        check_adapter_matches(adapter, load(checkpoints("qwen3")))


def test_other_sizes_are_refused(adapter, tmp_path):
    tiny.save_checkpoint(tmp_path / "wide", "llama", hidden_size=128)
    with pytest.raises(AdapterError, match="hidden_size 128 instead of 64"):
        check_adapter_matches(adapter, load(tmp_path / "wide"))


def test_without_a_record_layers_and_shapes_are_compared(adapter, llama, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    check_adapter_matches(folder, load(llama))
    tiny.save_checkpoint(tmp_path / "wide", "llama", intermediate_size=128)
    with pytest.raises(AdapterError, match=r"down_proj has 128 inputs here and 96 in the adapter"):
        check_adapter_matches(folder, load(tmp_path / "wide"))
    tiny.save_checkpoint(tmp_path / "short", "llama", num_hidden_layers=1)
    with pytest.raises(AdapterError, match=r"there is no layer model\.layers\.1\.mlp\.down_proj") as caught:
        check_adapter_matches(folder, load(tmp_path / "short"))
    assert "and 4 more" in caught.value.got and len(str(caught.value)) < 1500


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor:UserWarning")  # PEFT on trained biases
def test_every_kind_of_key_is_understood(checkpoints, tmp_path):
    for options in (
        {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True},
        {"modules_to_save": ["lm_head"], "bias": "all"},
        {"trainable_token_indices": [3]},
        {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    ):
        save_adapter(adapted(load(checkpoints("qwen2")), **options), tmp_path / "out")
        check_adapter_matches(tmp_path / "out", load(checkpoints("qwen2")))
    with pytest.raises(AdapterError):
        (tmp_path / "out" / "pantheraml.json").unlink()
        check_adapter_matches(tmp_path / "out", load(checkpoints("phi3")))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_expert_adapters_are_understood(checkpoints, tmp_path):
    model = adapted(load(checkpoints("qwen3_moe")))
    save_adapter(model, tmp_path / "out")
    check_adapter_matches(tmp_path / "out", load(checkpoints("qwen3_moe")))
    again = PeftModel.from_pretrained(load(checkpoints("qwen3_moe")), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_trained_embeddings_of_another_vocabulary_are_refused(checkpoints, tmp_path):
    base = load(checkpoints("llama"))
    base.resize_token_embeddings(520, mean_resizing=False)
    save_adapter(adapted(base, modules_to_save=["embed_tokens", "lm_head"]), tmp_path / "out")
    with pytest.raises(AdapterError, match=r"lm_head is \[512, 64\] here and \[520, 64\] in the adapter"):
        check_adapter_matches(tmp_path / "out", load(checkpoints("llama")))
    check_adapter_matches(tmp_path / "out", base)


def test_a_folder_without_an_adapter_is_explained(llama, tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        check_adapter_matches(llama, load(llama))


def test_named_adapters_get_a_record_each(llama, tmp_path):
    model = adapted(load(llama))
    model.add_adapter("second", model.peft_config["default"])
    save_adapter(model, tmp_path / "out")
    check_adapter_matches(tmp_path / "out", load(llama))
    check_adapter_matches(tmp_path / "out" / "second", load(llama))


def test_a_damaged_save_keeps_the_old_adapter(adapter, llama, tmp_path):
    model = adapted(load(llama))
    save_adapter(model, tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nobody"):
        save_adapter(model, tmp_path, selected_adapters=["nobody"])
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), before)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_adapter(model, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
