"""Models that cannot be loaded, and flags that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests import tiny
from tests.errors.workshop import CannotHappenHere, Workshop, case

# --- files --------------------------------------------------------------------------------------------------


@case
def missing_folder(shop: Workshop) -> None:
    shop.load(shop.root / "no-such-folder")


@case
def hub_id_offline(shop: Workshop) -> None:
    shop.load("nobody/nothing-at-all")


@case
def bad_hub_id(shop: Workshop) -> None:
    shop.load("what is this")


@case
def no_config(shop: Workshop) -> None:
    folder = shop.copy("model")
    (folder / "config.json").unlink()
    shop.load(folder)


@case
def damaged_config(shop: Workshop) -> None:
    folder = shop.copy("model")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": ')
    shop.load(folder)


@case
def config_of_the_wrong_kind(shop: Workshop) -> None:
    folder = shop.copy("model")
    (folder / "config.json").write_text("[1, 2]")
    shop.load(folder)


@case
def unknown_architecture(shop: Workshop) -> None:
    _edit(shop.copy("model"), model_type="lama")


@case
def no_architecture(shop: Workshop) -> None:
    folder = shop.copy("model")
    (folder / "config.json").write_text("{}")
    shop.load(folder)


@case
def not_a_language_model(shop: Workshop) -> None:
    from transformers import ViTConfig, ViTModel

    folder = shop.folder("model")
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    ViTModel(ViTConfig(**sizes, patch_size=4)).save_pretrained(folder)
    shop.tokenizer.save_pretrained(folder)
    shop.load(folder)


@case
def no_tokenizer(shop: Workshop) -> None:
    folder = shop.copy("model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    shop.load(folder)


@case
def no_weights(shop: Workshop) -> None:
    folder = shop.copy("model")
    (folder / "model.safetensors").unlink()
    shop.load(folder)


@case
def truncated_weights(shop: Workshop) -> None:
    folder = shop.copy("model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    shop.load(folder)


@case
def weights_that_are_an_lfs_pointer(shop: Workshop) -> None:
    folder = shop.copy("model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    (folder / "model.safetensors").write_text(pointer)
    shop.load(folder)


@case
def missing_shard(shop: Workshop) -> None:
    folder = shop.folder("model")
    tiny.build_model().save_pretrained(folder, max_shard_size="200KB")
    shop.tokenizer.save_pretrained(folder)
    max(folder.glob("model-*.safetensors")).unlink()
    shop.load(folder)


@case
def pickles_only(shop: Workshop) -> None:
    folder = shop.copy("model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    shop.load(folder)


@case
def missing_tensors(shop: Workshop) -> None:
    _edit(shop.copy("model"), num_hidden_layers=3)


@case
def other_shapes(shop: Workshop) -> None:
    _edit(shop.copy("model"), intermediate_size=80)


def _edit(folder: Path, **changes: Any) -> None:
    """Change ``config.json`` of ``folder`` and load it."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    Workshop.load(None, folder)  # pyright: ignore[reportArgumentType]


# --- adapters -----------------------------------------------------------------------------------------------


def _adapter(shop: Workshop, base: Path) -> Path:
    """A saved adapter of the tiny Llama that names ``base`` as its model."""
    folder = shop.folder("adapter")
    shop.adapted().save_pretrained(folder, shop.tokenizer)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


@case
def adapter_whose_base_is_gone(shop: Workshop) -> None:
    shop.load(_adapter(shop, shop.root / "gone"))


@case
def adapter_without_a_base(shop: Workshop) -> None:
    folder = shop.folder("adapter")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shop.load(folder)


@case
def adapter_of_other_weights(shop: Workshop) -> None:
    other = shop.root / "other"
    shutil.rmtree(other, ignore_errors=True)
    shop.load(_adapter(shop, tiny.save_checkpoint(other, seed=1)))


@case
def adapter_of_another_shape(shop: Workshop) -> None:
    other = shop.root / "other"
    shutil.rmtree(other, ignore_errors=True)
    shop.load(_adapter(shop, tiny.save_checkpoint(other, hidden_size=32)))


@case
def adapter_of_another_shape_without_a_record(shop: Workshop) -> None:
    other = shop.root / "other"
    shutil.rmtree(other, ignore_errors=True)
    folder = _adapter(shop, tiny.save_checkpoint(other, hidden_size=32))
    (folder / "pantheraml.json").unlink()
    shop.load(folder)


@case
def adapter_in_full_finetuning(shop: Workshop) -> None:
    shop.load(_adapter(shop, shop.llama), full_finetuning=True)


# --- precision ----------------------------------------------------------------------------------------------


@case
def unknown_dtype(shop: Workshop) -> None:
    shop.load(dtype="bflot16")


@case
def two_precisions(shop: Workshop) -> None:
    shop.load(load_in_4bit=True, load_in_8bit=True)


@case
def full_finetuning_in_4bit(shop: Workshop) -> None:
    shop.load(full_finetuning=True, load_in_4bit=True)


@case
def float32_in_16bit(shop: Workshop) -> None:
    shop.load(load_in_16bit=True, dtype="float32", load_in_4bit=None)


@case
def fp8_in_full_finetuning(shop: Workshop) -> None:
    shop.load(load_in_fp8=True, full_finetuning=True)


@case
def fp8_of_odd_sizes(shop: Workshop) -> None:
    folder = shop.root / "odd"
    sizes = dict(hidden_size=40, intermediate_size=24, num_attention_heads=5, num_key_value_heads=1)
    tiny.save_checkpoint(folder, **sizes)
    shop.load(folder, load_in_fp8=True)


@case
def stored_4bit_asked_for_8bit(shop: Workshop) -> None:
    folder = shop.root / "stored"
    shutil.rmtree(folder, ignore_errors=True)
    shop.load(load_in_4bit=True).save_pretrained(folder)
    shop.tokenizer.save_pretrained(folder)
    shop.load(folder, load_in_8bit=True)


@case
def stored_4bit_in_full_finetuning(shop: Workshop) -> None:
    folder = shop.root / "stored"
    shutil.rmtree(folder, ignore_errors=True)
    shop.load(load_in_4bit=True).save_pretrained(folder)
    shop.tokenizer.save_pretrained(folder)
    shop.load(folder, full_finetuning=True)


@case
def stored_in_a_foreign_format(shop: Workshop) -> None:
    _edit(shop.copy("model"), quantization_config={"quant_method": "gptq", "bits": 4})


# --- devices ------------------------------------------------------------------------------------------------


def _without_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        raise CannotHappenHere("a GPU is there")


@case
def max_memory(shop: Workshop) -> None:
    shop.load(max_memory={0: "10GB"})


@case
def two_devices(shop: Workshop) -> None:
    shop.load(device_map={"model.embed_tokens": 0, "model.layers": "cpu"})


@case
def no_such_gpu(shop: Workshop) -> None:
    _without_gpu()
    shop.load(device_map="cuda:7")


@case
def negative_gpu(shop: Workshop) -> None:
    _without_gpu()
    shop.load(device_map=-1)


@case
def unknown_device(shop: Workshop) -> None:
    shop.load(device_map="atuo")


@case
def empty_device_map(shop: Workshop) -> None:
    shop.load(device_map={})


@case
def two_device_maps(shop: Workshop) -> None:
    shop.load(auto_device_map=True, device_map="cpu")


# --- arguments ----------------------------------------------------------------------------------------------


@case
def misspelt_argument(shop: Workshop) -> None:
    shop.load(max_seq_len=64)


@case
def unknown_argument(shop: Workshop) -> None:
    shop.load(zzz=1)


@case
def argument_of_another_framework(shop: Workshop) -> None:
    shop.load(fast_inference=True)


@case
def unknown_kernels(shop: Workshop) -> None:
    shop.load(kernels="fast")


@case
def unknown_recompute(shop: Workshop) -> None:
    shop.load(use_gradient_checkpointing="maybe")


@case
def no_length(shop: Workshop) -> None:
    shop.load(max_seq_length=0)


@case
def unknown_rope_scaling(shop: Workshop) -> None:
    shop.load(rope_scaling={"type": "linera", "factor": 2.0})


@case
def rope_scaling_that_shrinks(shop: Workshop) -> None:
    shop.load(rope_scaling={"rope_type": "linear", "factor": 0.5})


@case
def rope_scaling_that_lacks_settings(shop: Workshop) -> None:
    shop.load(rope_scaling={"rope_type": "llama3", "factor": 2.0})


@case
def rope_scaling_of_several_ropes(shop: Workshop) -> None:
    shop.load(tiny.save_checkpoint(shop.folder("model"), "gemma3_text"), rope_scaling={"factor": 2.0})


def _gpt2(shop: Workshop) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = shop.folder("model")
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    shop.tokenizer.save_pretrained(folder)
    return folder


@case
def more_than_the_learned_positions(shop: Workshop) -> None:
    shop.load(_gpt2(shop), max_seq_length=64)


@case
def rope_scaling_of_learned_positions(shop: Workshop) -> None:
    shop.load(_gpt2(shop), max_seq_length=32, rope_scaling={"factor": 2.0})


@case
def other_number_of_labels(shop: Workshop) -> None:
    folder = shop.root / "classifier"
    shop.load(num_labels=2).save_pretrained(folder)
    shop.tokenizer.save_pretrained(folder)
    shop.load(folder, num_labels=5)


@case
def unknown_attention(shop: Workshop) -> None:
    shop.load(attn_implementation="flashy")
