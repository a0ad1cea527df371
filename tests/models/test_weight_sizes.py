"""Bytes predicted from a configuration against those of models that were really loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from pantheraml import FastLanguageModel
from pantheraml.devices.inventory import DTYPES
from pantheraml.models import assembly
from pantheraml.models.families import find_family
from pantheraml.models.loading import load_config
from pantheraml.models.precision import Precision
from pantheraml.models.recompute_plan import kept_per_token, passing_bytes
from pantheraml.models.weight_sizes import measure_parts
from tests import tiny

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "phi3", "gpt_oss"]
PRECISIONS = {
    "float32": ("plain", dict(load_in_4bit=False, dtype="float32")),
    "bfloat16": ("plain", dict(load_in_4bit=False, dtype="bfloat16")),
    "float16": ("plain", dict(load_in_4bit=False, dtype="float16")),
    "4bit": ("4bit", dict(load_in_4bit=True, dtype="bfloat16")),
    "8bit": ("8bit", dict(load_in_8bit=True, dtype="bfloat16")),
    "fp8": ("fp8", dict(load_in_fp8=True, dtype="bfloat16")),
}


@pytest.fixture(autouse=True)
def fp8_without_a_gpu(monkeypatch):
    """FP8 weights can be loaded anywhere; it is their products that need a GPU."""
    monkeypatch.setattr(assembly, "check_precision", lambda *_: None)


def load(folder, **flags):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, device_map="cpu", **flags)[0]


def precision_of(name):
    storage, flags = PRECISIONS[name]
    return Precision(storage, DTYPES[flags["dtype"]])


def state_bytes(weight):
    """Bytes of the scales and tables that bitsandbytes keeps beside a weight."""
    state = getattr(weight, "quant_state", None)
    tensors = [getattr(weight, "SCB", None)]
    while state is not None:
        tensors += [state.absmax, state.code, getattr(state, "offset", None)]
        state = state.state2
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def held_bytes(model):
    """(embedding, layers, head) of a loaded model, tensor by tensor."""
    family = find_family(model.config)
    layers = [0] * model.config.get_text_config().num_hidden_layers
    ends = {"embedding": 0, "head": 0}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        size = tensor.nbytes + state_bytes(tensor)
        if name.startswith(family.layers):
            layers[int(name.removeprefix(f"{family.layers}.").split(".")[0])] += size
        else:
            ends["embedding" if "embed_tokens" in name else "head"] += size
    return ends["embedding"], layers, ends["head"]


def predicted_bytes(parts):
    return parts.embedding.weights, [layer.weights for layer in parts.layers], parts.head.weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_loaded_is_what_was_predicted(checkpoints, family, precision):
    folder = checkpoints(family)
    parts = measure_parts(load_config(folder), precision_of(precision))
    model = load(folder, **PRECISIONS[precision][1])
    assert predicted_bytes(parts) == held_bytes(model)
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert parts.tied == is_tied == (family in ("gemma2", "gemma3_text"))
    assert parts.is_4bit == (precision == "4bit")


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_that_is_stored_in_4_bits(tmp_path, double):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # A weight of 96 x 8192 has more than 256 blocks; one layer is left alone.
    plain = tiny.save_checkpoint(tmp_path / "plain", hidden_size=96, intermediate_size=8192)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=quantised, dtype=torch.float32, device_map={"": "cpu"}
    )
    folder = tmp_path / "stored"
    model.save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    parts = measure_parts(load_config(folder), precision_of("4bit"))
    assert predicted_bytes(parts) == held_bytes(load(folder, dtype="bfloat16"))
    assert parts.layers[0].weights < parts.layers[1].weights / 2, "a layer was left alone"


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe_some_dense"])
def test_what_an_adapter_adds(checkpoints, tmp_path, family):
    folder = (
        tiny.save_checkpoint(tmp_path, "qwen3_moe", mlp_only_layers=[0])
        if family == "qwen3_moe_some_dense"
        else checkpoints(family)
    )
    parts = measure_parts(load_config(folder), precision_of("bfloat16"), rank=4)
    model = load(folder, dtype="bfloat16", load_in_4bit=False)
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    numbers = [0] * len(parts.layers)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            assert weight.dtype == torch.float32
            numbers[int(name.split(".layers.")[1].split(".")[0])] += weight.numel()
    assert [layer.trained for layer in parts.layers] == [16 * count for count in numbers]
    assert min(numbers) > 0 and parts.embedding.trained == parts.head.trained == 0


def test_what_training_all_weights_adds(checkpoints):
    """Of masters in float32 a gradient and two moments, beside themselves; of 16-bit weights a 16-bit gradient."""
    config = load_config(checkpoints("gemma3_text"))
    whole = measure_parts(config, precision_of("float32"), full_finetuning=True)
    scale = 4  # a buffer
    assert whole.embedding.trained == 3 * (whole.embedding.weights - scale) == 12 * 512 * 64
    assert [layer.trained for layer in whole.layers] == [3 * layer.weights for layer in whole.layers]
    assert whole.head.trained == 12 * 64, "the norm alone, the head is the embedding"
    half = measure_parts(config, precision_of("bfloat16"), full_finetuning=True)
    assert half.layers[0].trained == 3 * half.layers[0].weights, "moments have the dtype of the weights"


def test_times_follow_from_the_numbers_a_token_meets(checkpoints):
    parts = measure_parts(load_config(checkpoints("llama")), precision_of("4bit"))
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert [layer.time for layer in parts.layers] == [1.0, 1.0]
    assert (parts.embedding.time, parts.head.time) == (0.0, pytest.approx(512 * 64 / layer))
    # Two of four experts; the router of 4 rows.
    parts = measure_parts(load_config(checkpoints("mixtral")), precision_of("4bit"))
    mixture = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 96 + 4 * 64
    assert parts.head.time == pytest.approx(512 * 64 / mixture)


def test_activations_are_those_of_the_recompute_plan():
    model = tiny.build_model("qwen3").to(torch.bfloat16).requires_grad_(False)
    parts = measure_parts(model.config, precision_of("bfloat16"), fused=False, rank=0)
    kept = kept_per_token(model)
    assert (parts.kept_per_token, parts.kept_when_recomputing) == (kept.all, kept.attended)
    passing = max(parts.layer_passing(100), parts.head_passing(100))
    assert passing == passing_bytes(model, 100, recomputes=True)
    fused = measure_parts(model.config, precision_of("bfloat16"))
    assert fused.kept_per_token < parts.kept_per_token


def test_an_architecture_without_a_family():
    assert measure_parts(GPT2Config(), precision_of("float32")) is None


def test_the_model_is_neither_read_nor_made(checkpoints):
    """Random numbers and the configuration stay as they were; bitsandbytes, which asks CUDA, stays out."""
    config = load_config(checkpoints("llama"))
    before, state = config.to_dict(), torch.random.get_rng_state()
    measure_parts(config, precision_of("4bit"))
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    program = (
        "import sys, torch\n"
        "from transformers import LlamaConfig\n"
        "from pantheraml.models.precision import Precision\n"
        "from pantheraml.models.weight_sizes import measure_parts\n"
        "config = LlamaConfig(num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, num_key_value_heads=8)\n"
        "parts = measure_parts(config, Precision('4bit', torch.bfloat16))\n"
        "assert 30e9 < sum(layer.weights for layer in parts.layers) < 40e9\n"
        "assert not torch.cuda.is_initialized() and 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
