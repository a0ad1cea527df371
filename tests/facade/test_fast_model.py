"""FastLanguageModel: what its arguments do, end to end on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel, FastModel
from pantheraml.errors import ConfigError, HardwareError, NotYetError
from pantheraml.models.patching import PatchSet
from pantheraml.models.state import get_state
from tests import tiny

IDS = torch.arange(5, 29)[None]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")


@pytest.fixture
def load(llama):
    def load(folder=None, **flags):
        flags = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
        return FastLanguageModel.from_pretrained(str(folder or llama), **flags)[0]

    return load


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def train(model, mixed=False) -> list[float]:
    """The loss before each of five steps; every trained weight gets a finite gradient."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- precisions ---------------------------------------------------------------------------------------------


@pytest.mark.promise("A2")
@pytest.mark.parametrize(
    ("flags", "layer", "stored", "beside"),
    [
        ({"load_in_4bit": None}, Linear4bit, torch.uint8, torch.float32),
        ({"load_in_4bit": True, "dtype": "bfloat16"}, Linear4bit, torch.uint8, torch.bfloat16),
        ({"load_in_8bit": True}, Linear8bitLt, torch.int8, torch.float32),
        ({"load_in_8bit": True, "dtype": "float16"}, Linear8bitLt, torch.int8, torch.float16),
        ({"load_in_16bit": True}, torch.nn.Linear, torch.bfloat16, torch.bfloat16),
        ({"dtype": "float16"}, torch.nn.Linear, torch.float16, torch.float16),
        ({}, torch.nn.Linear, torch.float32, torch.float32),
    ],
)
def test_every_precision_trains_an_adapter(load, flags, layer, stored, beside):
    model = load(**flags)
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection) is layer and projection.weight.dtype == stored
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        assert part.weight.dtype == beside
    model = FastLanguageModel.for_training(FastLanguageModel.get_peft_model(model, r=4))
    assert {w.dtype for w in model.parameters() if w.requires_grad} == {torch.float32}
    losses = train(model, mixed=beside != torch.float32)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.promise("A2")
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({}, torch.float32), ({"load_in_16bit": True}, torch.bfloat16), ({"dtype": "bfloat16"}, torch.bfloat16)],
)
def test_full_finetuning_trains_every_weight(load, flags, dtype):
    model = FastLanguageModel.for_training(load(full_finetuning=True, **flags))
    before = [weight.clone() for weight in model.parameters()]
    losses = train(model)
    assert losses[-1] < losses[0] and {weight.dtype for weight in model.parameters()} == {dtype}
    assert all(not torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))


# --- switching ----------------------------------------------------------------------------------------------


@pytest.mark.promise("A9")
def test_for_training_and_for_inference_return_the_model(load):
    model = FastLanguageModel.get_peft_model(load(), r=2, lora_dropout=0.1)
    assert FastLanguageModel.for_training(model) is model and model.training
    model.config.use_cache = False
    assert FastLanguageModel.for_inference(model) is model and not model.training
    assert model.config.use_cache is True
    out = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 27 and torch.equal(out[:, :24], IDS)
    assert FastLanguageModel.for_training(model).training
    assert FastModel is FastLanguageModel


@pytest.mark.promise("A9")
def test_switching_works_for_any_transformers_model():
    model = tiny.build_model()
    assert FastLanguageModel.for_training(model) is model and model.training
    assert FastLanguageModel.for_inference(model) is model and not model.training
    with pytest.raises(ConfigError, match="use_gradient_checkpointing='yes'"):
        FastLanguageModel.for_training(model, use_gradient_checkpointing="yes")


# --- what is changed on the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_reverting_all_patches_gives_the_stock_model(checkpoints, load, family):
    folder = checkpoints(family)
    model = load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ledger = get_state(model).patches
    assert ledger.report() and "save_pretrained_merged" in vars(model)
    ledger.revert()
    assert ledger.report() == []
    assert torch.equal(logits(model), logits(stock))
    assert model.config._attn_implementation == stock.config._attn_implementation
    assert model.save_pretrained.__func__ is type(stock).save_pretrained
    assert not hasattr(model, "save_pretrained_merged") and not hasattr(model, "save_pretrained_gguf")


def test_kernels_off_leaves_nothing_but_saving(load, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model = load(kernels="off")
    saving = {"save_pretrained", "save_pretrained_merged", "push_to_hub", "push_to_hub_merged"}
    saving |= {"save_pretrained_gguf", "push_to_hub_gguf"}
    changed = {change.what for change in get_state(model).patches.report()}
    assert changed == {f"{name}() added" for name in saving}
    assert "fused parts" not in caplog.text
    on = {change.what for change in get_state(load()).patches.report()}
    assert any("_attn_implementation" in what for what in on)


def test_an_adapter_is_in_the_same_ledger(load):
    base = load()
    stock = logits(base)
    model = FastLanguageModel.get_peft_model(base, r=2)
    get_state(model).patches.revert()
    assert "save_pretrained_merged" not in vars(model) and "save_pretrained_merged" not in vars(base)
    torch.testing.assert_close(logits(model), stock, rtol=0, atol=1e-5)
    assert isinstance(get_state(model).patches, PatchSet)


# --- devices and arguments ----------------------------------------------------------------------------------


@pytest.mark.promise("A2")
@no_gpu
@pytest.mark.parametrize(
    "device_map",
    [
        None,
        "auto",
        "balanced",
        "sequential",
        "cpu",
        torch.device("cpu"),
        {"": "cpu"},
        {"model": "cpu", "lm_head": "cpu"},
    ],
)
def test_forms_of_device_map(load, device_map):
    assert load(device_map=device_map).device.type == "cpu"


@no_gpu
def test_auto_device_map_is_the_automatic_one(load):
    assert load(auto_device_map=True, device_map=None).device.type == "cpu"
    assert load(auto_device_map=True, device_map="auto").device.type == "cpu"
    with pytest.raises(ConfigError, match="Keep device_map"):
        load(auto_device_map=True, device_map="cpu")


@no_gpu
@pytest.mark.parametrize("device_map", ["cuda", "cuda:1", 0, {"": 0}, -1])
def test_gpus_that_are_not_there(load, device_map):
    with pytest.raises(HardwareError, match="this process sees no GPU"):
        load(device_map=device_map)


@pytest.mark.parametrize("device_map", ["disk", "tpu", True, {}, {"": "gpu"}, 1.5])
def test_device_maps_that_are_none(load, device_map):
    with pytest.raises(ConfigError, match="device_map"):
        load(device_map=device_map)


def test_weights_that_train_stay_on_gpus(load):
    with pytest.raises(ConfigError, match="device_map puts 'lm_head' on 'cpu'"):
        load(device_map={"model": 0, "lm_head": "cpu"})


@no_gpu
def test_limits_are_for_gpus_that_are_there(load):
    with pytest.raises(ConfigError, match="max_memory names GPU 0, which this process does not see"):
        load(max_memory={0: "1GB"})


@no_gpu
@pytest.mark.parametrize("wish", [True, False, None])
def test_use_multi_gpu_changes_nothing_without_gpus(load, wish):
    assert load(use_multi_gpu=wish).device.type == "cpu"


@pytest.mark.parametrize("length", [0, -1, 2.0, "2048", True, None])
def test_lengths_that_are_none(load, length):
    with pytest.raises(ConfigError, match="max_seq_length="):
        load(max_seq_length=length)
    if length is not None:
        with pytest.raises(ConfigError, match="max_seq_length="):
            FastLanguageModel.get_peft_model(load(), max_seq_length=length)


def test_one_adapter_and_none_on_full_finetuning(load):
    from pantheraml.errors import AdapterError

    model = load()
    adapted = FastLanguageModel.get_peft_model(model, r=2)
    for again in (adapted, model):
        with pytest.raises(AdapterError, match="a model that has an adapter"):
            FastLanguageModel.get_peft_model(again, r=2)
    with pytest.raises(ConfigError, match="full_finetuning=True"):
        FastLanguageModel.get_peft_model(load(full_finetuning=True), r=2)


def test_an_adapter_cannot_be_fully_finetuned_and_is_refused_before_its_base_is_loaded(
    load, tmp_path, caplog
):
    FastLanguageModel.get_peft_model(load(), r=2).save_pretrained(tmp_path)
    caplog.clear()
    caplog.set_level("INFO", logger="pantheraml")
    with pytest.raises(ConfigError, match="for the adapter"):
        load(tmp_path, full_finetuning=True)
    assert "fused parts" not in caplog.text


def test_trained_parts_are_counted_in_the_log(load, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    FastLanguageModel.get_peft_model(load(), r=2, target_modules=["q_proj"])
    assert "LoRA r=2: 512 of 127,808 parameters are trained (0.40 %)" in caplog.text


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    "name", ["fast_inference", "gpu_memory_utilization", "max_lora_rank", "offload_embedding"]
)
def test_arguments_of_another_framework(load, name):
    with pytest.raises(NotYetError, match=f"from_pretrained got {name}=1"):
        load(**{name: 1})
