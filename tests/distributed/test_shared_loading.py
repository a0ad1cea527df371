"""Quantised weights that ranks share out: the bits that one process loads, and no rank ever holds all of them."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pantheraml import FastLanguageModel, MultiGPUConfig
from pantheraml.models.shares import local, whole
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.live_bytes import LiveBytes

SHARED = MultiGPUConfig(strategy="fsdp", shard_frozen=True)
FLAGS = {"4bit": dict(load_in_4bit=True), "fp8": dict(load_in_fp8=True)}


def load(folder, kind, config, **options):
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, use_multi_gpu=config, **FLAGS[kind], **options
    )[0]


def pieces(model):
    """Every tensor of a model as one process has it, by name: values, scales, scales of scales."""
    found = {name: value.detach() for name, value in model.named_buffers()}
    for name, weight in model.named_parameters():
        found[name] = whole(weight).detach()
        state = getattr(weight, "quant_state", None)
        if state is not None:
            found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
            found[f"{name} stands for"] = torch.tensor([*state.shape, state.dtype.itemsize])
    return found


def compare(cases):
    """Of each case, the names of tensors that are not as one process has them, and how many ranks share out."""
    found = {}
    for folder, kind, options in cases:
        expected, model = (
            pieces(load(folder, kind, MultiGPUConfig(), **options)),
            load(folder, kind, SHARED, **options),
        )
        shares = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
        assert all(2 * local(weight).numel() == weight.numel() for weight in shares)
        gathered = pieces(model)
        odd = expected.keys() ^ gathered.keys()
        odd |= {
            name for name in expected.keys() & gathered.keys() if not same(expected[name], gathered[name])
        }
        about = (
            model.hf_quantizer.quantization_config.quant_method,
            model.config.quantization_config.quant_method,
        )
        found[folder.name, kind] = odd, len(shares), {str(getattr(one, "value", one)) for one in about}
    return found


def same(one, other):
    bits = [value.flatten().view(torch.uint8) for value in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and bits[0].equal(bits[1])


def test_the_bits_of_one_process(tmp_path):
    folders = [tiny.save_checkpoint(tmp_path / name, name) for name in ("qwen2", "qwen3_moe", "gemma3_text")]
    half, stored = tmp_path / "half", tmp_path / "stored"
    tiny.build_model("llama").bfloat16().save_pretrained(half)
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(half, quantization_config=packing).save_pretrained(stored)
    for folder in (half, stored):
        tiny.build_tokenizer().save_pretrained(folder)
    cases = [(folder, kind, {}) for folder in folders for kind in FLAGS]
    cases += [(half, kind, {"dtype": "float16"}) for kind in FLAGS] + [(stored, "4bit", {})]
    for found in run_ranks(2, compare, cases):
        assert len(found) == 9
        for (name, kind), (odd, shares, about) in found.items():
            assert not odd, (name, kind)
            assert shares == 2 * {"qwen3_moe": 7}.get(name, 7)
            assert about == {"bitsandbytes" if kind == "4bit" else "pantheraml_fp8"}


def peaks_of_loads(folder):
    """Of each kind, bytes of tensors that a load holds at its highest, and of quantised weights in the end."""
    found = {}
    for kind in FLAGS:
        with LiveBytes() as live:
            model = load(folder, kind, SHARED)
        found[kind] = live.most, sum(local(one).nbytes for one in model.parameters() if one.itemsize == 1)
    return found


def test_no_rank_holds_all_weights_while_it_loads(tmp_path):
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=24, num_key_value_heads=4)
    for found in run_ranks(2, peaks_of_loads, tiny.save_checkpoint(tmp_path, **sizes)):
        for kind, (most, shares) in found.items():
            assert shares == 24 * 10 * 2**16 * {"4bit": 0.25, "fp8": 0.5}[kind]
            assert most < 0.8 * 2 * shares, kind
