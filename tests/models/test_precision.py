"""Flags, dtype, device and what a checkpoint holds decide how weights are held; every branch."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.kernels import fp8_product
from pantheraml.models.precision import Precision, PrecisionFlags, check_precision, choose_precision
from tests import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLAGS = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def choose(dtype=None, device=CPU, stored=None, **flags) -> Precision:
    return choose_precision(PrecisionFlags(**flags), dtype, device, stored)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an older GPU would choose float16")
@pytest.mark.parametrize(
    ("flags", "dtype", "on_cpu", "on_gpu"),
    [
        ({}, None, ("4bit", F32), ("4bit", BF16)),
        ({}, "float16", ("4bit", F16), ("4bit", F16)),
        ({"load_in_4bit": True}, None, ("4bit", F32), ("4bit", BF16)),
        ({"load_in_4bit": True}, torch.bfloat16, ("4bit", BF16), ("4bit", BF16)),
        ({"load_in_4bit": False}, None, ("plain", F32), ("plain", BF16)),
        ({"load_in_4bit": False}, "fp16", ("plain", F16), ("plain", F16)),
        ({"load_in_8bit": True}, None, ("8bit", F32), ("8bit", BF16)),
        ({"load_in_8bit": True, "load_in_4bit": False}, None, ("8bit", F32), ("8bit", BF16)),
        ({"load_in_8bit": True}, "half", ("8bit", F16), ("8bit", F16)),
        ({"load_in_fp8": True}, None, ("fp8", F32), ("fp8", BF16)),
        ({"load_in_fp8": True, "load_in_4bit": False}, "float16", ("fp8", F16), ("fp8", F16)),
        ({"load_in_16bit": True}, None, ("plain", BF16), ("plain", BF16)),
        ({"load_in_16bit": True}, "float16", ("plain", F16), ("plain", F16)),
        ({"load_in_16bit": True, "load_in_4bit": False}, None, ("plain", BF16), ("plain", BF16)),
        ({"full_finetuning": True}, None, ("plain", F32), ("plain", F32)),
        ({"full_finetuning": True}, "torch.bfloat16", ("plain", BF16), ("plain", BF16)),
        ({"full_finetuning": True, "load_in_4bit": False}, None, ("plain", F32), ("plain", F32)),
        ({"full_finetuning": True, "load_in_16bit": True}, None, ("plain", BF16), ("plain", BF16)),
        ({"full_finetuning": True, "load_in_16bit": True}, "float16", ("plain", F16), ("plain", F16)),
    ],
)
def test_what_is_chosen(flags, dtype, on_cpu, on_gpu):
    assert choose(dtype, CPU, **flags) == Precision(*on_cpu)
    assert choose(dtype, GPU, **flags) == Precision(*on_gpu)


@pytest.mark.promise("F2")
@pytest.mark.parametrize("pair", list(combinations(FLAGS, 2)))
def test_two_precisions_are_refused(pair):
    with pytest.raises(ConfigError, match=f"{pair[0]}=True and {pair[1]}=True were given together"):
        choose(**dict.fromkeys(pair, True))


@pytest.mark.parametrize(
    ("flags", "dtype", "error", "message"),
    [
        ({"load_in_fp8": True, "full_finetuning": True}, None, ConfigError, "Drop load_in_fp8"),
        ({"load_in_4bit": True, "full_finetuning": True}, None, ConfigError, "Drop load_in_4bit"),
        ({"load_in_8bit": True, "full_finetuning": True}, None, ConfigError, "Drop load_in_8bit"),
        ({"load_in_16bit": True}, "float32", ConfigError, "Drop load_in_16bit"),
        ({"load_in_16bit": True, "full_finetuning": True}, F32, ConfigError, "Drop load_in_16bit"),
        ({}, torch.int8, ConfigError, "torch.int8"),
    ],
)
def test_what_is_refused(flags, dtype, error, message):
    with pytest.raises(error, match=message):
        choose(dtype, **flags)


def test_fp8_needs_a_gpu_that_multiplies_it(monkeypatch):
    check_precision(Precision("fp8", F32), CPU)
    check_precision(Precision("plain", BF16), GPU)
    monkeypatch.setattr(fp8_product, "why_no_fp8", lambda device: "NVIDIA A100 has compute capability 8.0")
    with pytest.raises(HardwareError, match=r"A100 has .* 8\.0\. .*8\.9 or newer.*load_in_8bit=True"):
        check_precision(Precision("fp8", BF16), GPU)


def test_the_quantisation_is_nf4_twice_and_int8():
    four = Precision("4bit", BF16).quantization_config()
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == BF16
    assert Precision("8bit", BF16).quantization_config().load_in_8bit
    assert Precision("fp8", BF16).quantization_config().quant_method == "pantheraml_fp8"
    assert Precision("plain", BF16).quantization_config() is None


@pytest.fixture(scope="module")
def stored(checkpoints, tmp_path_factory):
    """Checkpoints that bitsandbytes quantised and transformers saved, in bfloat16 computation."""
    folders = {}
    for name, config in {
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=BF16),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
    }.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoints("llama"), quantization_config=config, dtype=BF16
        )
        model.save_pretrained(folders[name])
        tiny.build_tokenizer().save_pretrained(folders[name])
    return folders


def load(folder, **flags):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, device_map="cpu", **flags)[0]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("4bit", {}),
        ("4bit", {"load_in_4bit": True}),
        ("8bit", {}),
        ("8bit", {"load_in_8bit": True}),
        ("8bit", {"load_in_8bit": True, "load_in_4bit": False}),
        ("8bit", {"load_in_4bit": False}),
    ],
)
def test_a_stored_format_stays(stored, name, flags):
    layer = load(stored[name], **flags).model.layers[0].mlp.up_proj
    if name == "4bit":
        assert isinstance(layer, Linear4bit) and layer.weight.quant_type == "fp4"
    else:
        assert isinstance(layer, Linear8bitLt) and layer.weight.dtype == torch.int8


@pytest.mark.parametrize(
    ("name", "flags", "dropped"),
    [
        ("4bit", {"load_in_4bit": False}, "load_in_4bit=False"),
        ("4bit", {"load_in_8bit": True}, "load_in_8bit=True"),
        ("4bit", {"load_in_16bit": True}, "load_in_16bit=True"),
        ("4bit", {"full_finetuning": True}, "full_finetuning=True"),
        ("8bit", {"load_in_4bit": True}, "load_in_4bit=True"),
        ("8bit", {"load_in_16bit": True}, "load_in_16bit=True"),
        ("8bit", {"full_finetuning": True}, "full_finetuning=True"),
        ("8bit", {"load_in_fp8": True}, "load_in_fp8=True"),
    ],
)
def test_a_stored_format_refuses_every_other(stored, name, flags, dropped):
    with pytest.raises(
        ConfigError, match=f"{dropped} was given for a checkpoint that is stored in {name[0]}-bit"
    ):
        load(stored[name], **flags)


@pytest.mark.parametrize("name", ["4bit", "8bit"])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_a_stored_checkpoint_computes_in_the_dtype_asked_for(stored, name, dtype):
    model = load(stored[name], dtype=dtype)
    expected = {None: F32, "float16": F16, "bfloat16": BF16}[dtype]
    assert {weight.dtype for weight in model.parameters() if weight.is_floating_point()} == {expected}
    assert model.pantheraml_state.precision == Precision(name, expected)
    if name == "4bit":
        assert model.model.layers[0].mlp.up_proj.compute_dtype == expected
    assert model(torch.arange(5, 20)[None]).logits.dtype == expected


def test_other_formats_are_refused():
    for stored in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {}):
        with pytest.raises(ConfigError, match="stored quantised by"):
            choose(stored=stored)
