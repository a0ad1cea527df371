"""Merging into and out of bitsandbytes precisions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pantheraml.errors import NotYetError
from pantheraml.export.merge import merged_tensors, save_merged
from tests import tiny
from tests.export.models import adapted, assert_same, logits, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Tiny checkpoints whose sizes are multiples of a quantisation block."""
    root = tmp_path_factory.mktemp("even")

    def get(family: str):
        if not (root / family).exists():
            tiny.save_checkpoint(root / family, family, intermediate_size=128)
        return root / family

    return get


def load(folder, quantization=None, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization).eval()


def stored_4bit(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}


@pytest.mark.promise("F8")
@pytest.mark.parametrize("training", [True, False], ids=["trained", "after-inference"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_4bit_base_is_read_as_training_saw_it(family, training, base, tmp_path):
    model = adapted(load(base(family), NF4))
    logits(model.train(training))  # inference re-packs weights on some CPUs
    expected, before = logits(model), snapshot(model)
    save_merged(model, tmp_path / "out", tiny.build_tokenizer())
    assert_same(snapshot(model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.5
    assert (logits(loaded) - expected).abs().max() < 0.1


def test_a_4bit_base_is_rounded_once(base, tmp_path):
    import bitsandbytes.functional as bnb

    model = adapted(load(base("llama"), NF4)).train()
    save_merged(model, tmp_path / "out")
    layer = model.base_model.model.model.layers[1].mlp.gate_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    seen = bnb.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    saved = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    assert saved.equal((seen.float() + delta.float()).bfloat16())


@pytest.mark.promise("F8")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_an_8bit_base(base, tmp_path):
    model = adapted(load(base("llama"), INT8))
    expected, before = logits(model), snapshot(model)
    save_merged(model, tmp_path / "out")
    assert_same(snapshot(model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(loaded) - expected).abs().max() < 0.1  # the live model also rounds its activations
    original = load_file(base("llama") / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    with model.disable_adapter():
        unmerged = dict(merged_tensors(model, "float32"))["model.layers.0.mlp.up_proj.weight"]
    assert (unmerged - original).abs().max() <= original.abs().max() / 127


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_4bit_is_what_transformers_would_quantise(family, base, tmp_path):
    model = adapted(load(base(family)))
    before = snapshot(model)
    save_merged(model, tmp_path / "sixteen")
    save_merged(model, tmp_path / "four", save_method="merged_4bit", max_shard_size="100KB")
    assert_same(snapshot(model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "four").eval()
    reference = load(tmp_path / "sixteen", NF4)
    assert loaded.is_loaded_in_4bit and len(stored_4bit(loaded)) >= 8
    assert_same(stored_4bit(loaded), stored_4bit(reference))
    torch.testing.assert_close(logits(loaded), logits(reference), rtol=0, atol=0)
    config = json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"] is True


def test_a_4bit_checkpoint_can_be_trained_and_merged_again(base, tmp_path):
    save_merged(load(base("mixtral")), tmp_path / "four", save_method="merged_4bit")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "four"))
    expected = logits(model)
    save_merged(model, tmp_path / "sixteen")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sixteen").eval()
    assert type(loaded.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert (logits(loaded) - expected).abs().max() < 0.1
    save_merged(model, tmp_path / "again", save_method="4bit")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").is_loaded_in_4bit


def test_trained_embeddings_on_a_4bit_base(base, tmp_path):
    model = adapted(load(base("llama"), NF4), modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    save_merged(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(loaded) - logits(model)).abs().max() < 0.1
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert loaded.lm_head.weight.equal(trained.bfloat16())


def test_other_quantisations_are_refused_before_anything_is_written(base, tmp_path):
    model = load(base("llama"))
    from transformers import TorchAoConfig  # only its name is needed: torchao itself is not

    model.hf_quantizer, model.config.quantization_config = object(), object.__new__(TorchAoConfig)
    model.config.quantization_config.quant_method = "torchao"
    with pytest.raises(NotYetError, match="torchao"):
        save_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
