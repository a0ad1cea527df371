"""Every argument of get_peft_model acts, on the names each architecture has."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pantheraml import FastLanguageModel
from pantheraml.errors import AdapterError, ConfigError
from pantheraml.models.adapters import count_parameters, has_adapter
from tests import tiny

IDS = torch.arange(5, 29)[None]
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture
def base(checkpoints):
    def load(family="llama", **flags):
        flags = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
        return FastLanguageModel.from_pretrained(str(checkpoints(family)), **flags)[0]

    return load


@pytest.fixture
def adapt(base):
    def adapt(family="llama", flags=None, **settings):
        return FastLanguageModel.get_peft_model(base(family, **flags or {}), **{"r": 4, **settings})

    return adapt


def trained(model) -> dict[str, torch.nn.Parameter]:
    """Trained weights, by their names without PEFT's additions."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def adapted_layers(model) -> set[str]:
    return {name.partition(".lora_")[0] for name in trained(model) if ".lora_" in name}


def last_names(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def shake(model, seed=0):
    """Random adapter weights: a fresh adapter changes nothing, which would hide much."""
    generator = torch.Generator().manual_seed(seed)
    for weight in trained(model).values():
        weight.data += torch.randn(weight.shape, generator=generator) * 0.05
    return model


# --- size and scale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_r_is_the_rank(adapt, rank):
    weights = trained(adapt(r=rank))
    assert {w.shape[0] for name, w in weights.items() if "lora_A" in name} == {rank}
    assert {w.shape[1] for name, w in weights.items() if "lora_B" in name} == {rank}
    assert all("lora_" in name and w.dtype == torch.float32 for name, w in weights.items())


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(16, False, 4.0), (8, False, 2.0), (8, True, 8 / 2)])
def test_alpha_and_rslora_are_the_scale(adapt, alpha, rslora, scale):
    model = shake(adapt(r=4, lora_alpha=alpha, use_rslora=rslora))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(3, 64)
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x) - layer.base_layer(x), scale * update, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_alone(adapt):
    model = shake(adapt(lora_dropout=0.5))
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal((still := shake(adapt())).train()(IDS).logits, still(IDS).logits)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("all", {"q_proj", "k_proj", "v_proj"}), ("lora_only", {"q_proj"})],
)
def test_bias_says_which_biases_are_trained(adapt, bias, expected):
    weights = trained(adapt("qwen2", bias=bias, target_modules=["q_proj"]))
    biases = {
        name.split(".")[-2 if "base_layer" not in name else -3] for name in weights if name.endswith("bias")
    }
    assert biases == expected


# --- where --------------------------------------------------------------------------------------------------


def test_the_seven_projections_are_the_default(adapt):
    layers = adapted_layers(adapt())
    assert last_names(layers) == SEVEN and len(layers) == 14


@pytest.mark.parametrize(
    ("given", "layers"), [(None, {"0", "1"}), (1, {"1"}), ([0], {"0"}), ((0, 1), {"0", "1"})]
)
def test_layers_to_transform(adapt, given, layers):
    found = adapted_layers(adapt(layers_to_transform=given))
    assert {name.split(".")[2] for name in found} == layers and last_names(found) == SEVEN


@pytest.mark.parametrize("bad", [[], [0, 2], -1, 7])
def test_layers_that_are_not_there(adapt, bad):
    with pytest.raises(AdapterError, match="Layers are numbered from 0 to 1"):
        adapt(layers_to_transform=bad)


def test_layers_pattern_names_the_list_of_layers(adapt):
    found = adapted_layers(adapt(layers_to_transform=[1], layers_pattern="layers"))
    assert {name.split(".")[2] for name in found} == {"1"}
    with pytest.raises(AdapterError, match="PEFT refuses these settings"):
        adapt(layers_to_transform=[1], layers_pattern="blocks")
    with pytest.raises(AdapterError, match="layers_to_transform"):
        adapt(layers_pattern="layers")


def test_target_modules_by_name_and_by_expression(adapt):
    assert last_names(adapted_layers(adapt(target_modules=["q_proj", "up_proj"]))) == {"q_proj", "up_proj"}
    assert last_names(adapted_layers(adapt(target_modules=("v_proj",)))) == {"v_proj"}
    found = adapted_layers(adapt(target_modules=r".*layers\.1\.mlp\.(up|down)_proj"))
    assert found == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    found = adapted_layers(adapt("qwen3_moe", target_modules=r".*layers\.1\..*(q|v)_proj"))
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("family", "flags", "expected"),
    [
        ("llama", {}, SEVEN),
        ("llama", {"load_in_4bit": True}, SEVEN),
        ("llama", {"num_labels": 1}, SEVEN),
        ("phi3", {}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        # two wrappers around the experts of a layer, none around its router
        ("mixtral", {}, {*ATTENTION, "experts", "base_layer"}),
        ("qwen3_moe", {}, {*ATTENTION, "experts", "base_layer"}),
        ("gpt_oss", {}, {*ATTENTION, "experts", "base_layer"}),
    ],
)
def test_all_linear_leaves_heads_and_routers_out(adapt, family, flags, expected):
    assert last_names(adapted_layers(adapt(family, flags, target_modules="all-linear"))) == expected
    one_layer = adapted_layers(adapt(family, flags, target_modules="all-linear", layers_to_transform=[1]))
    assert {name.split(".")[2] for name in one_layer} == {"1"} and last_names(one_layer) == expected


def test_merged_projections_are_mapped_and_told(adapt, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    found = last_names(adapted_layers(adapt("phi3", target_modules=["q_proj", "v_proj", "down_proj"])))
    assert found == {"qkv_proj", "down_proj"}
    assert "phi3 names its projections differently: q_proj -> qkv_proj, v_proj -> qkv_proj." in caplog.text
    assert last_names(adapted_layers(adapt("phi3", target_modules=["qkv_proj"]))) == {"qkv_proj"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("layers", "count"), [(None, 2), ([1], 1)])
def test_experts_are_adapted_layer_by_layer(adapt, family, layers, count, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model = adapt(family, layers_to_transform=layers)
    experts = {name for name in adapted_layers(model) if ".mlp.experts" in name}
    assert {name.split(".")[2] for name in experts} == {str(layer) for layer in layers or (0, 1)}
    assert len(experts) == 2 * count, "gate_up_proj and down_proj"
    assert "gate_proj -> mlp.experts.gate_up_proj" in caplog.text
    before = logits(model)
    assert not torch.allclose(logits(shake(model)), before, atol=1e-4)


def test_layers_without_experts_beside_layers_with_them(tmp_path, caplog):
    """PEFT takes gate_proj, up_proj and down_proj of such a model for the experts' weights; the log says so."""
    tiny.save_checkpoint(tmp_path, "qwen3_moe", mlp_only_layers=[0])
    model, _ = FastLanguageModel.from_pretrained(
        str(tmp_path), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    found = {name for name in adapted_layers(model) if ".mlp." in name}
    assert found == {"model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"}
    assert "gate_proj, up_proj, down_proj are not adapted" in caplog.text


def test_experts_can_be_left_out(adapt):
    model = adapt("mixtral", target_modules=list(ATTENTION), lora_dropout=0.1)
    assert last_names(adapted_layers(model)) == ATTENTION
    for name, value in (("lora_dropout", 0.1), ("use_dora", True), ("lora_bias", True)):
        with pytest.raises(AdapterError, match=f"{name}={value} was given for a mixture of experts"):
            adapt("mixtral", **{name: value})


def test_target_parameters_of_the_users_own(adapt):
    found = adapted_layers(
        adapt("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    )
    assert last_names(found) == {"q_proj", "experts"}


def test_embeddings_and_head_are_trained_in_full(adapt, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    weights = trained(adapt(target_modules=["q_proj", "embed_tokens", "lm_head"]))
    whole = {name for name in weights if "lora_" not in name}
    assert whole == {"model.embed_tokens.modules_to_save.weight", "lm_head.modules_to_save.weight"}
    assert "embed_tokens and lm_head are trained in full" in caplog.text
    also = trained(adapt(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    assert weights.keys() == also.keys()
    with pytest.raises(AdapterError, match="names nothing that LoRA can adapt"):
        adapt(target_modules=["embed_tokens"])


def test_modules_to_save_are_trained_beside_the_adapter(adapt):
    model = adapt(modules_to_save=["norm"])
    whole = {name for name in trained(model) if "lora_" not in name}
    assert "model.norm.modules_to_save.weight" in whole
    model(IDS, labels=IDS).loss.backward()
    assert trained(model)["model.norm.modules_to_save.weight"].grad.abs().max() > 0


def test_names_that_are_not_there(adapt):
    for name in ("q_porj", "c_attn", "experts"):
        with pytest.raises(AdapterError, match=f"target_modules has '{name}', which this llama"):
            adapt(target_modules=["v_proj", name])
    with pytest.raises(AdapterError, match="Did you mean 'q_proj'"):
        adapt(target_modules=["q_porj"])
    for expression in ("q_proj", "("):
        with pytest.raises(AdapterError, match="Give a list of names instead"):
            adapt(target_modules=expression)
    with pytest.raises(AdapterError, match="PEFT refuses these settings"):
        adapt(target_modules=["input_layernorm"])


def test_any_transformers_model_can_be_adapted():
    model = FastLanguageModel.get_peft_model(tiny.build_model("qwen3"), r=2)
    assert last_names(adapted_layers(model)) == SEVEN and not hasattr(model, "save_pretrained_merged")


# --- start --------------------------------------------------------------------------------------------------


def test_an_adapter_starts_by_changing_nothing(base, adapt):
    assert torch.equal(logits(adapt()), logits(base()))
    assert not torch.equal(logits(shake(adapt())), logits(base()))


def test_random_state_decides_the_start_and_nothing_else_does(adapt):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = trained(adapt(random_state=1))
    assert torch.equal(torch.rand(4), expected), (
        "the process's own random numbers go on as if nothing had happened"
    )
    same, other = trained(adapt(random_state=1)), trained(adapt(random_state=2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


def test_gaussian_start(adapt):
    weights = trained(adapt(r=8, init_lora_weights="gaussian"))
    values = torch.cat([w.flatten() for name, w in weights.items() if "lora_A" in name])
    assert values.std().item() == pytest.approx(1 / 8, rel=0.05)
    kaiming = torch.cat([w.flatten() for name, w in trained(adapt(r=8)).items() if "lora_A" in name])
    assert kaiming.abs().max() <= 1 / math.sqrt(64) and values.abs().max() > 3 / 8


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_take_their_part_from_the_base(base, adapt, start):
    """The adapter holds a part of each weight and the base the rest: together what was loaded."""
    model = adapt(init_lora_weights=start)
    assert all(w.abs().max() > 0 for name, w in trained(model).items() if "lora_B" in name)
    torch.testing.assert_close(logits(model), logits(base()), rtol=1e-4, atol=1e-4)
    layer = "model.layers.0.mlp.up_proj"
    rest = model.get_submodule(f"base_model.model.{layer}").base_layer.weight
    assert not torch.allclose(rest, base().get_submodule(layer).weight, atol=1e-4)


def test_orthogonal_start(base, adapt):
    model = adapt(init_lora_weights="orthogonal")
    assert all(w.abs().max() > 0 for name, w in trained(model).items() if "lora_B" in name)
    torch.testing.assert_close(logits(model), logits(base()), rtol=1e-4, atol=1e-4)


def test_loftq_start(base, adapt):
    pytest.importorskip("scipy")
    if not torch.cuda.is_available():
        pytest.skip("PEFT computes it on a GPU")
    model = adapt(init_lora_weights="loftq")
    assert model.peft_config["default"].loftq_config["loftq_bits"] == 4
    error = (logits(model) - logits(base())).norm() / logits(base()).norm()
    assert 0 < error < 0.5
    closer = adapt(init_lora_weights="loftq", loftq_config={"loftq_bits": 8})
    assert (logits(closer) - logits(base())).norm() < (logits(model) - logits(base())).norm()


@pytest.mark.promise("F1")
def test_loftq_where_it_cannot_be(adapt):
    with pytest.raises(ConfigError, match="It is read only by the LoftQ"):
        adapt(loftq_config={"loftq_bits": 4})
    for flags in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        with pytest.raises(ConfigError, match="given for quantised weights"):
            adapt(flags=flags, init_lora_weights="loftq")


@pytest.mark.promise("F1")
def test_dora_learns_magnitudes(base, adapt):
    model = adapt(use_dora=True)
    magnitudes = {name: w for name, w in trained(model).items() if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 14
    torch.testing.assert_close(logits(model), logits(base()), rtol=1e-4, atol=1e-4)
    model(IDS, labels=IDS).loss.backward()
    assert all(w.grad.abs().max() > 0 for w in magnitudes.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.0}, "r=2.0"),
        ({"r": True}, "r=True"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_dropout": None}, "lora_dropout=None"),
        ({"bias": "some"}, "bias='some'"),
        ({"rank": 4}, "rank=4"),
    ],
)
def test_settings_out_of_range(adapt, settings, message):
    with pytest.raises(ConfigError, match=message):
        adapt(**settings)


@pytest.mark.promise("F1")
def test_any_field_of_loraconfig_is_understood(adapt):
    model = adapt(rank_pattern={"q_proj": 2})
    ranks = {name.split(".")[-3]: w.shape[0] for name, w in trained(model).items() if "lora_A" in name}
    assert ranks["q_proj"] == 2 and ranks["v_proj"] == 4


# --- saved adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "flags", "settings"),
    [
        ("llama", {}, {}),
        ("llama", {"load_in_4bit": True}, {"use_rslora": True}),
        ("llama", {"load_in_8bit": True}, {}),
        ("llama", {"load_in_16bit": True}, {"use_dora": True}),
        ("llama", {}, {"init_lora_weights": "pissa"}),
        ("llama", {}, {"init_lora_weights": "olora"}),
        ("llama", {}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"num_labels": 2}, {}),
        ("qwen2", {}, {"bias": "all", "layers_to_transform": [1]}),
        ("mixtral", {}, {}),
        ("phi3", {}, {"target_modules": r".*qkv_proj"}),
    ],
)
def test_a_saved_adapter_comes_back(adapt, checkpoints, tmp_path, family, flags, settings):
    model = shake(adapt(family, flags, **settings))
    expected = logits(model)
    model.save_pretrained(tmp_path, tiny.build_tokenizer())
    again, _ = FastLanguageModel.from_pretrained(
        str(tmp_path), **{"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
    )
    tolerance = 1e-4 if "init_lora_weights" in settings else 0
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=tolerance)
    assert trained(again).keys() == trained(model).keys(), "it comes back trainable"


@pytest.mark.promise("F11")
def test_a_resized_vocabulary_comes_back_with_the_adapter(adapt, tmp_path):
    ids = torch.tensor([[5, 590, 511, 20]])
    model = shake(adapt(flags={"resize_model_vocab": 600, "random_state": 5})).eval()
    model.save_pretrained(tmp_path, tiny.build_tokenizer())
    again, _ = load(tmp_path)
    assert again.get_input_embeddings().weight.shape[0] == 600
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_saving_and_loading_an_adapter_never_asks_the_hub(adapt, llama, tmp_path, monkeypatch):
    """PEFT would, about the vocabulary of a base model that is not a folder; offline it warns."""
    monkeypatch.chdir(tmp_path)
    model = shake(adapt())
    model.peft_config["default"].base_model_name_or_path = "org/name"
    model.save_pretrained(tmp_path / "adapter", tiny.build_tokenizer())
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(llama)
    assert torch.equal(logits(load(tmp_path / "adapter")[0]), logits(model))


@pytest.fixture
def saved(adapt, tmp_path):
    """A saved adapter without a record of its base, and its weights."""
    shake(adapt()).save_pretrained(tmp_path, tiny.build_tokenizer())
    (tmp_path / "pantheraml.json").unlink()
    return tmp_path, load_file(tmp_path / "adapter_model.safetensors")


def load(folder):
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )


def test_an_adapter_without_a_weight_is_refused(saved):
    folder, weights = saved
    name = next(iter(weights))
    save_file({key: w for key, w in weights.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="1 of its weights do not match"):
        load(folder)


def test_an_adapter_with_a_weight_too_many_is_refused(saved):
    folder, weights = saved
    more = {**weights, "base_model.model.model.layers.0.input_layernorm.lora_A.weight": torch.zeros(4, 64)}
    save_file(more, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="input_layernorm"):
        load(folder)


def test_an_adapter_of_another_rank_than_it_says_is_refused(saved):
    folder, _ = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    with pytest.raises(AdapterError, match="does not fit the base model"):
        load(folder)


def test_what_counts_as_a_parameter(base, adapt):
    plain, packed = base(), base(load_in_4bit=True)
    total = sum(weight.numel() for weight in plain.parameters())
    assert count_parameters(plain) == (total, total)
    assert count_parameters(packed)[1] == total > sum(weight.numel() for weight in packed.parameters())
    model = adapt()
    mine = sum(weight.numel() for weight in trained(model).values())
    assert count_parameters(model) == (mine, total + mine)
    assert has_adapter(model) and has_adapter(model.get_base_model()) and not has_adapter(plain)


def test_a_plain_peft_configuration_is_what_is_attached(adapt):
    config = adapt(r=4, lora_alpha=8, lora_dropout=0.1, bias="all").peft_config["default"]
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0.1, "all")
    assert config.task_type == "CAUSAL_LM"
    assert adapt(flags={"num_labels": 1}).peft_config["default"].task_type == "SEQ_CLS"
