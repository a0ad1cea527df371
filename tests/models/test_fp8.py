"""FP8 layers: what they compute, what they keep through casts and copies, and how a checkpoint becomes them."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import AdapterError
from pantheraml.models.fp8 import Fp8Linear, choose_turned, quantise_weight
from tests import tiny
from tests.kernels.fp8_cases import rows, sqnr


def layer(n=48, k=64, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return Fp8Linear(k, n, bias, dtype=dtype)


def load(folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), 64, load_in_fp8=True, device_map="cpu", **options
    )
    return model, tokenizer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient(bias, dtype):
    linear = layer(bias=bias, dtype=dtype)
    plain = nn.Linear(64, 48, bias).double()
    plain.load_state_dict({name: value.double() for name, value in linear.named_parameters()})
    linear.quantise_()
    assert linear.quantise_().is_quantised and linear.compute_dtype == dtype
    x = rows("normal", (24, 64), dtype).view(4, 6, 64).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = linear(x), plain(exact)
    dy = rows("gradients", (24, 48), dtype).view(4, 6, 48)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == x.grad.dtype == dtype and y.shape == (4, 6, 48)
    assert sqnr(y.detach().view(24, 48), expected.detach().view(24, 48)) > 22
    assert sqnr(x.grad.view(24, 64), exact.grad.view(24, 64)) > 22
    assert all(parameter.grad is None for parameter in linear.parameters())


def test_before_and_after():
    linear = layer(bias=True)
    x = torch.randn(3, 64)
    before = linear(x)
    torch.testing.assert_close(before, nn.functional.linear(x, linear.weight, linear.bias))
    weight = linear.weight.detach().clone()
    linear.quantise_()
    assert sqnr(linear.dequantised(), weight) > 29
    assert "e4m3" in repr(linear) and not linear.weight.requires_grad


def test_autocast_decides_what_is_computed_in():
    linear = layer().quantise_()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 64)).dtype == torch.bfloat16
    assert linear(torch.randn(3, 64)).dtype == torch.float32


@pytest.mark.parametrize("change", ["to", "half", "float", "copy", "state"])
def test_what_is_held_survives(change):
    linear = layer().quantise_()
    values, scales = linear.weight.view(torch.uint8).clone(), linear.weight_scale.clone()
    if change == "to":
        linear = linear.to(torch.bfloat16)
    elif change in ("half", "float"):
        linear = getattr(linear, change)()
    elif change == "copy":
        linear = copy.deepcopy(linear)
    else:
        state = linear.state_dict()
        assert set(state) == {"weight", "weight_scale"}
        linear = layer().quantise_()
        linear.weight_scale.zero_()
        linear.load_state_dict(state)
    assert linear.weight.dtype == torch.float8_e4m3fn and linear.weight_scale.dtype == torch.float32
    assert torch.equal(linear.weight.view(torch.uint8), values) and torch.equal(linear.weight_scale, scales)
    assert not linear.weight.requires_grad


def test_rows_of_zeros_leave_room_for_an_adapter():
    weight = rows("normal", (32, 64)) * 0.02
    weight[3], weight[5] = 0, weight[5] * 1e-6
    values, scales = quantise_weight(weight)
    assert (scales >= scales.median() / 64).all() and (values[3].float() == 0).all()
    others = torch.arange(32) != 5
    assert sqnr((values.float() * scales[:, None])[others], weight[others]) > 29
    assert quantise_weight(torch.zeros(16, 16))[1].min() == 1e-6


def test_a_weight_is_quantised_a_part_at_a_time(monkeypatch):
    weight = rows("normal", (37, 64))
    whole = quantise_weight(weight)
    monkeypatch.setattr("pantheraml.models.fp8._CHUNK", 64 * 5)
    for a, b in zip(whole, quantise_weight(weight), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "mixtral"])
def test_loading_replaces_the_linears_inside_and_no_others(checkpoints, family):
    model, _ = load(checkpoints(family))
    found = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert len(found) >= 6 and all(".layers." in name for name in found)
    assert all(model.get_submodule(name).is_quantised for name in found)
    assert model.dtype == torch.float32 and type(model.get_output_embeddings()) is nn.Linear
    stock = AutoModelForCausalLM.from_pretrained(checkpoints(family), dtype=torch.float32)
    for name in found:
        assert sqnr(model.get_submodule(name).dequantised(), stock.get_submodule(name).weight.detach()) > 28
    ids = torch.arange(5, 45).view(2, 20)
    if family != "mixtral":  # a router may choose another expert for a rounding's sake
        ours, theirs = model(ids).logits.detach().flatten(1), stock(ids).logits.detach().flatten(1)
        assert sqnr(ours, theirs) > 15
    assert choose_turned(model) == len(found) and not model.get_submodule(min(found)).keeps_turned


def test_the_format_is_not_saved_as_a_checkpoint(llama, tmp_path):
    model, _ = load(llama)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_peft_computes_from_the_base_is_refused(llama, settings):
    model, _ = load(llama)
    with pytest.raises(AdapterError, match="for weights in FP8"):
        FastLanguageModel.get_peft_model(model, r=4, **settings)


def test_the_adapter_starts_as_beside_other_weights(llama):
    fp8 = FastLanguageModel.get_peft_model(load(llama)[0], r=4)
    plain, _ = FastLanguageModel.from_pretrained(str(llama), 64, load_in_4bit=False, device_map="cpu")
    plain = FastLanguageModel.get_peft_model(plain, r=4)
    theirs = dict(plain.named_parameters())
    adapters = {name: value for name, value in fp8.named_parameters() if "lora_" in name}
    assert adapters and all(torch.equal(value, theirs[name]) for name, value in adapters.items())
    with pytest.raises((RuntimeError, NotImplementedError)):
        fp8.merge_adapter()  # e4m3 has no sums: nothing is merged by mistake


@pytest.mark.promise("A2")
def test_trains_generates_and_merges(llama, tmp_path):
    model, tokenizer = load(llama)
    model = FastLanguageModel.get_peft_model(model, r=4)
    data = Dataset.from_dict({"text": [tiny.TEXTS[i % 3] for i in range(8)]})
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-2, use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = PantheraMLTrainer(model, args, train_dataset=data, tokenizer=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.97 * losses[0]
    FastLanguageModel.for_inference(model)
    ids = torch.arange(5, 25)[None]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > 20

    model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not any("weight_scale" in name for name in merged.state_dict())
    base = model.get_base_model().model.layers[0].mlp.up_proj
    delta = base.lora_B["default"].weight @ base.lora_A["default"].weight * base.scaling["default"]
    exact = base.base_layer.dequantised() + delta
    torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight, exact, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert sqnr(model(ids).logits[0], merged(ids).logits[0]) > 15
    model.save_pretrained_merged(tmp_path / "four", tokenizer, save_method="merged_4bit")
    assert (tmp_path / "four" / "model.safetensors").exists()
