"""What is saved merged is what the live model computes, and the live model stays as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, PromptTuningConfig, get_peft_model
from peft.utils.warning import PeftWarning
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from pantheraml.errors import AdapterError, ConfigError, SaveError
from pantheraml.export.merge import merged_tensors, save_merged
from pantheraml.export.weights import plain_weights
from tests import tiny
from tests.export.models import FUSED, LINEAR, adapted, assert_same, logits, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own remark on experts; the adapter is where it belongs, as the logits show.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def keys_on_disk(folder) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def peft_oracle(model) -> dict[str, torch.Tensor]:
    """PEFT's own merge, on a copy."""
    return copy.deepcopy(model).merge_and_unload().state_dict()


def assert_equal_to_peft(model, tolerance: float = 1e-6) -> None:
    """Every merged weight equals PEFT's, and the adapter did change something."""
    ours, theirs = dict(merged_tensors(model, "float32")), peft_oracle(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
        )
    base = {weight.name: weight.values() for weight in plain_weights(model, trained=False)}
    assert max(float((ours[name] - base[name]).abs().max()) for name in base) > 1e-2


@pytest.mark.promise("F8")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_loads_in_plain_transformers_with_equal_logits(family, checkpoints, tmp_path):
    model = adapted(load(checkpoints(family)), use_rslora=True)
    expected, before, random_state = logits(model), snapshot(model), torch.get_rng_state()
    save_merged(model, tmp_path / "out", tiny.build_tokenizer(), dtype="float32", max_shard_size="150KB")
    assert_same(snapshot(model), before)
    assert torch.get_rng_state().equal(random_state)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert_equal_to_peft(model)

    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert keys_on_disk(tmp_path / "out") == keys_on_disk(checkpoints(family))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert config["architectures"] == [type(loaded).__name__]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHATML
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == tiny.VOCAB


@pytest.mark.promise("F8")
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": True, "target_modules": [*LINEAR, "embed_tokens"]},
        {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        {"trainable_token_indices": [3, 5, 8]},
        {"lora_alpha": 3, "r": 5, "rank_pattern": {"q_proj": 2}},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_kind_of_adapter(options, checkpoints, tmp_path):
    model = adapted(load(checkpoints("qwen2")), **options)  # its q, k and v have biases
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    before = snapshot(model)
    save_merged(model, tmp_path / "out", dtype="float32")
    assert_same(snapshot(model), before)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)
    assert_equal_to_peft(model)


def test_conv1d_weights_are_in_by_out(tmp_path):
    config = AutoConfig.for_model("gpt2", vocab_size=512, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    config.bos_token_id = config.eos_token_id = 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"]
    for use_dora in (False, True):
        model = adapted(
            load(tmp_path / "base"), target_modules=targets, fan_in_fan_out=True, use_dora=use_dora
        )
        save_merged(model, tmp_path / "out", dtype="float32")
        torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)
        assert_equal_to_peft(model)
    save_merged(model, tmp_path / "sixteen")
    save_merged(model, tmp_path / "four", save_method="merged_4bit")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    in_4bit = load(tmp_path / "four").state_dict()
    reference = load(tmp_path / "sixteen", quantization_config=nf4).state_dict()
    assert_same(in_4bit, reference)
    assert sum(tensor.dtype == torch.uint8 for tensor in in_4bit.values()) >= 4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_tied_embeddings_trained_apart_are_saved_untied(trained, tmp_path):
    tiny.save_checkpoint(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    model = adapted(load(tmp_path / "base"), modules_to_save=[trained])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    save_merged(model, tmp_path / "out", dtype="float32")
    loaded = load(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainable_token_indices": [3, 5]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_embeddings_that_stay_tied_are_saved_once(options, tmp_path):
    tiny.save_checkpoint(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    model = adapted(load(tmp_path / "base"), **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    save_merged(model, tmp_path / "out", dtype="float32")
    assert "lm_head.weight" not in keys_on_disk(tmp_path / "out")
    assert load(tmp_path / "out").config.tie_word_embeddings is True
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_lora_on_a_tied_embedding_unties_it(tmp_path):
    tiny.save_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    model = adapted(load(tmp_path / "base"), target_modules=["q_proj", "embed_tokens"])
    save_merged(model, tmp_path / "out", dtype="float32")
    assert load(tmp_path / "out").config.tie_word_embeddings is False
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)


def test_several_active_adapters_and_none(llama, tmp_path):
    model = adapted(load(llama))
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    assert_equal_to_peft(model)
    model.base_model.set_adapter("second")
    assert_equal_to_peft(model)
    with model.disable_adapter():
        assert_same(dict(merged_tensors(model, "float32")), load(llama).state_dict())


def test_a_model_merged_in_place_is_not_merged_twice(llama, tmp_path):
    model = adapted(load(llama))
    expected = logits(model)
    model.merge_adapter()
    save_merged(model, tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_rounded_once(dtype, llama, tmp_path):
    model = adapted(load(llama, dtype=dtype))
    assert (
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype
        == torch.float32
    )
    model.to(dtype)  # an adapter in 16 bits, too: PEFT's own delta would be rounded before it is added
    save_merged(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for layer, name in enumerate(LINEAR):
        layer = layer % 2
        part = "self_attn" if name in LINEAR[:4] else "mlp"
        wrapped = model.get_submodule(f"base_model.model.model.layers.{layer}.{part}.{name}")
        delta = wrapped.lora_B["default"].weight.float() @ wrapped.lora_A["default"].weight.float()
        exact = wrapped.base_layer.weight.float() + delta * wrapped.scaling["default"]
        assert saved[f"model.layers.{layer}.{part}.{name}.weight"].equal(exact.to(dtype))
    assert load(tmp_path / "out").dtype == dtype
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < (
        0.06 if dtype == torch.bfloat16 else 0.006
    )


def test_a_float32_model_becomes_bfloat16(llama, tmp_path):
    model = adapted(load(llama))
    save_merged(model, tmp_path / "out")
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 0.05


def test_a_fully_fine_tuned_model(checkpoints, tmp_path):
    model = load(checkpoints("mixtral"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.01)
    before = snapshot(model)
    save_merged(model, tmp_path / "out", dtype="float32")
    assert_same(snapshot(model), before)
    assert_same(load(tmp_path / "out").state_dict(), model.state_dict())
    assert keys_on_disk(tmp_path / "out") == keys_on_disk(checkpoints("mixtral"))


def test_a_model_built_without_a_checkpoint(tmp_path):
    model = adapted(tiny.build_model("qwen3_moe"))
    save_merged(model, tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)


def test_parameters_that_stay_in_float32_are_not_rounded(tmp_path):
    config = AutoConfig.for_model(
        "t5", vocab_size=512, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4
    )
    torch.manual_seed(0)
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration(config).eval()
    save_merged(model, tmp_path / "out", dtype="float16")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.float32} == {
        name for name in saved if ".wo." in name
    }


def test_a_new_save_replaces_the_shards_of_the_old_one(llama, tmp_path):
    model = adapted(load(llama))
    (tmp_path / "checkpoint-1").mkdir()
    save_merged(model, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save_merged(model, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "checkpoint-1").is_dir()


def test_an_adapter_in_the_same_folder_is_pointed_out(llama, tmp_path, caplog):
    model = adapted(load(llama))
    save_merged(model, tmp_path, save_method="lora")
    save_merged(model, tmp_path)
    assert "also holds an adapter" in caplog.text


@pytest.mark.parametrize("spelling", ["merged_16bit", "merged_16", "16bit"])
def test_spellings_of_the_method(spelling, llama, tmp_path):
    save_merged(load(llama), tmp_path / "out", save_method=spelling)
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"save_method": "merged_8bit"}, "'lora', 'merged_16bit', 'merged_4bit'"),
        ({"dtype": "float8"}, "float32, float16, bfloat16"),
        ({"max_shard_size": "much"}, "max_shard_size='5GB'"),
        ({"max_shard_size": 0}, "max_shard_size='5GB'"),
    ],
)
def test_wrong_words_are_explained(options, message, llama, tmp_path):
    with pytest.raises(ConfigError, match=message):
        save_merged(load(llama), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_cannot_be_merged_are_refused(llama, tmp_path):
    ia3 = get_peft_model(
        load(llama), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.k_proj.*save_method='lora'"):
        save_merged(ia3, tmp_path / "out")
    prompt = get_peft_model(load(llama), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(AdapterError, match="PROMPT_TUNING"):
        save_merged(prompt, tmp_path / "out")
    with pytest.warns(PeftWarning, match="has no bias"):
        without_place = adapted(load(llama), lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="lora_bias"):
        save_merged(without_place, tmp_path / "out")
    with pytest.raises(AdapterError, match="no adapter"):
        save_merged(load(llama), tmp_path / "out", save_method="lora")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(llama, tmp_path):
    model = adapted(load(llama))
    save_merged(model, tmp_path, dtype="float32")
    expected = logits(model)
    with torch.no_grad():
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        layer.lora_B["default"].weight.fill_(1e7)
    with pytest.raises(SaveError, match=r"layers\.1\.mlp\.up_proj.*float16.*dtype='bfloat16'"):
        save_merged(model, tmp_path, dtype="float16")
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(SaveError, match="NaN"):
        save_merged(model, tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=1e-5)


def test_weights_that_are_not_in_memory_are_named(llama, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(llama, device_map=places, offload_folder=tmp_path / "offloaded")
    with pytest.raises(SaveError, match=r"model\.layers\.1\..* is not in memory"):
        save_merged(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["offloaded"]


def test_references_added_to_layers_are_not_saved(llama, tmp_path):
    model = load(llama)
    for layer in model.model.layers:
        layer.also_here = layer.mlp  # as a fused layer may keep one
    save_merged(model, tmp_path / "out", dtype="float32")
    assert keys_on_disk(tmp_path / "out") == keys_on_disk(llama)
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(SaveError, match=r"lacks 1 tensors.*layers\.0\.mlp\.up_proj\.weight"):
        save_merged(model, tmp_path / "out")


def test_phi3_fused_projections_are_targets(checkpoints):
    model = adapted(load(checkpoints("phi3")), target_modules=FUSED, use_dora=True)
    assert_equal_to_peft(model)


def test_contradicting_generation_settings_do_not_cost_the_model(llama, tmp_path, caplog):
    model = load(llama)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.3
    save_merged(model, tmp_path / "out", dtype="float32")
    assert "contradict each other" in caplog.text
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.3
    assert_same(load(tmp_path / "out").state_dict(), model.state_dict())
