"""Weights and configuration: what is built from a folder, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError, ModelLoadError
from tests import tiny

IDS = torch.arange(5, 25)[None]


def load(folder, **flags):
    flags = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
    return FastLanguageModel.from_pretrained(str(folder), **flags)[0]


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_made_up_weights_are_refused(copy, flags):
    weights = load_file(copy / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weight \(model.layers.1.mlp.up_proj.weight\)"):
        load(copy, **flags)
    weights["model.layers.1.mlp.up_proj.weight"] = lost[:-1].contiguous()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelLoadError, match=r"holds 1 weight \(model.layers.1.mlp.up_proj.weight\) of another"
    ):
        load(copy, **flags)


def test_both_kinds_of_made_up_weights_are_named(copy):
    edit_config(copy, num_hidden_layers=3, intermediate_size=80)
    with pytest.raises(
        ModelLoadError, match=r"lacks 9 weights \(.*, …\) that .* holds 6 weights \(.*, …\) of"
    ):
        load(copy)


def test_weights_that_nobody_asks_for_are_no_error(copy):
    edit_config(copy, num_hidden_layers=1)
    assert len(load(copy).model.layers) == 1


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_is_built_with_a_head_that_the_seed_decides(llama, labels):
    one, same, other = (load(llama, num_labels=labels, random_state=seed) for seed in (7, 7, 8))
    assert type(one).__name__ == "LlamaForSequenceClassification"
    assert one.score.weight.shape == (labels, 64) and one.config.num_labels == labels
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert one(IDS).logits.shape == (1, labels)
    base = load(llama)
    assert torch.equal(one.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_a_classifier_keeps_its_trained_head(llama, tmp_path):
    model = load(llama, num_labels=2)
    model.save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, num_labels=2, random_state=1).score.weight, model.score.weight)
    assert torch.equal(load(tmp_path).score.weight, model.score.weight)
    with pytest.raises(ConfigError, match="num_labels=5 was given for a classifier that was saved with 2"):
        load(tmp_path, num_labels=5)


def test_attn_implementation_acts(llama):
    eager, default = load(llama, attn_implementation="eager"), load(llama, kernels="off")
    assert eager.config._attn_implementation == "eager" != default.config._attn_implementation
    weights = eager(IDS, output_attentions=True).attentions
    assert weights[0].shape == (1, 4, 20, 20)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, 4, 20))
    torch.testing.assert_close(eager(IDS).logits, default(IDS).logits, rtol=0, atol=1e-5)
    skipped = [change.why for change in eager.pantheraml_state.patches.report() if change.path == "attention"]
    assert skipped == ["an attn_implementation was given"]
    with pytest.raises(ConfigError, match="attn_implementation='eagre' cannot be used here"):
        load(llama, attn_implementation="eagre")


def test_flash_attention_that_is_not_there(llama):
    pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("it may be there")
    with pytest.raises(ConfigError, match="attn_implementation='flash_attention_2' cannot be used here"):
        load(llama, attn_implementation="flash_attention_2")


@pytest.mark.promise("F1")
def test_resize_model_vocab_acts_and_the_seed_decides_new_rows(llama):
    base = load(llama).get_input_embeddings().weight
    grown = [load(llama, resize_model_vocab=600, random_state=seed) for seed in (1, 1, 2)]
    one, same, other = (model.get_input_embeddings().weight for model in grown)
    assert one.shape == (600, 64) == grown[0].lm_head.weight.shape and grown[0].config.vocab_size == 600
    assert torch.equal(one[: len(base)], base)
    assert torch.equal(one, same) and not torch.equal(one[len(base) :], other[len(base) :])
    small = load(llama, resize_model_vocab=400)
    assert torch.equal(small.get_input_embeddings().weight, base[:400])


def test_loading_leaves_the_random_state_alone(llama):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    load(llama, num_labels=2, resize_model_vocab=600)
    assert torch.equal(torch.rand(3), expected)


def test_a_configuration_that_cannot_be_used(copy):
    edit_config(copy, hidden_size="many")
    with pytest.raises(ModelLoadError, match="must understand the settings of a llama model"):
        load(copy)


def test_another_architecture_under_the_same_weights(copy):
    edit_config(copy, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ModelLoadError, match="lacks"):
        load(copy)


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_folder_is_run_only_when_it_is_trusted(copy, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (copy / "own.py").write_text(MODELING)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(copy, model_type="own_llama", auto_map=names)
    with pytest.raises(ModelLoadError, match="pass trust_remote_code=True"):
        load(copy)
    model = load(copy, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert model(IDS).logits.shape == (1, 20, tiny.VOCAB)


def test_positions_of_an_architecture_without_a_family(tmp_path, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.pantheraml_state.family is None
    assert "fused parts: none" in caplog.text and "gpt2" in caplog.text
    assert model.config.pad_token_id == 0, "the tokenizer's, where the model names none"


@pytest.mark.parametrize("flags", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_an_evaluation_changes_no_gradient_of_a_quantised_model(tmp_path, flags):
    """bitsandbytes repacks 4-bit weights for inference on some CPUs, and has no gradient for what comes out."""
    tiny.save_checkpoint(tmp_path, intermediate_size=128)
    model = load(tmp_path, **{"load_in_4bit": None, **flags})
    model = FastLanguageModel.get_peft_model(model, r=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        model.train()
        model(IDS, labels=IDS).loss.backward()
        return {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad
        }

    before = gradients()
    with torch.no_grad():
        model.eval()(IDS)
    after = gradients()
    assert len(before) == 28
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_what_transformers_cannot_build_is_told_in_its_words(copy):
    edit_config(copy, hidden_act="sillu")
    with pytest.raises(
        ModelLoadError, match=r"could not be loaded as llama: sillu\. Weights and config\.json"
    ):
        load(copy)


def test_a_header_that_is_no_header(copy):
    (copy / "model.safetensors").write_bytes((12).to_bytes(8, "little") + b"not a header" + b"0" * 100)
    with pytest.raises(ModelLoadError, match="no readable safetensors header"):
        load(copy)
