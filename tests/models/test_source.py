"""Finding a model's files, and refusing what is missing, damaged, pickled or out of reach."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pantheraml.errors import ModelLoadError
from pantheraml.models.source import check_weights, resolve_config, resolve_source
from tests import tiny


@pytest.fixture
def copy(llama, tmp_path):
    """A private copy of the tiny Llama checkpoint."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def adapter(llama, tmp_path):
    """A saved adapter for the tiny Llama checkpoint."""
    base = tiny.build_model()
    base.name_or_path = str(llama)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_is_its_own_source(llama):
    source = resolve_source(str(llama))
    assert (source.folder, source.adapter, source.tokenizer_folder) == (llama, None, llama)


def test_an_adapter_leads_to_its_base(llama, adapter):
    source = resolve_source(str(adapter))
    assert (source.folder, source.adapter, source.name) == (llama, adapter, str(llama))
    assert source.tokenizer_folder == llama
    (adapter / "tokenizer_config.json").write_text("{}")
    assert source.tokenizer_folder == adapter
    assert resolve_config(str(adapter)) == llama


def test_an_adapter_whose_base_is_gone_names_both(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/nowhere/base"})
    )
    with pytest.raises(ModelLoadError, match=r"adapter in '.*adapter' was trained on '/nowhere/base'"):
        resolve_source(str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ModelLoadError, match="does not say which model"):
        resolve_source(str(adapter))


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", ""])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(ModelLoadError, match="There is no folder"):
        resolve_source(name)


def test_a_hub_id_without_network_and_cache():
    with pytest.raises(ModelLoadError, match="hf download nobody/nothing-at-all"):
        resolve_source("nobody/nothing-at-all")


def test_a_bad_hub_id():
    with pytest.raises(ModelLoadError, match="neither a folder here nor a model on the hub"):
        resolve_source("what is this")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ModelLoadError, match=r"holds no config\.json"):
        resolve_source(str(tmp_path))


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="holds no weights"):
        resolve_source(str(copy))


def test_pickles_are_never_opened(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelLoadError, match=r"pickles only \(pytorch_model.bin\)"):
        resolve_source(str(copy))


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "no readable"), (6, "no readable"), (100, "no readable"), (-1, "promises")]
)
def test_a_file_that_is_cut_short(copy, keep, message):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=message):
        resolve_source(str(copy))


def test_bytes_after_the_end_are_noticed(copy):
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelLoadError, match="promises"):
        resolve_source(str(copy))


def test_a_missing_shard_is_named(tmp_path):
    tiny.build_model().save_pretrained(tmp_path, max_shard_size="200KB")
    shards = check_weights(tmp_path, "model")
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(ModelLoadError, match=f"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        resolve_source(str(tmp_path))


def test_a_damaged_config_is_named(copy):
    adapter_config = copy / "adapter_config.json"
    (copy / "config.json").unlink()
    adapter_config.write_text("{not json")
    with pytest.raises(ModelLoadError, match="is not valid JSON"):
        resolve_source(str(copy))
    adapter_config.write_text("[]")
    with pytest.raises(ModelLoadError, match="holds no JSON object"):
        resolve_source(str(copy))


def test_the_check_accepts_every_file_safetensors_writes(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"a": torch.zeros(3), "empty": torch.zeros(0)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert check_weights(tmp_path, "model") == [tmp_path / "model.safetensors"]
