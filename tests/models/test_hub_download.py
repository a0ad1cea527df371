"""Models from the hub: exactly the files that are needed, from a real server, and then from the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models.hub_to_read import TOKEN, HubToRead

ROOT = Path(__file__).parents[2]
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
LOADS = {
    "main": {"name": "org/name", "token": TOKEN},
    "tried": {"name": "org/name", "revision": "tried", "token": TOKEN},
    "adapter": {"name": "org/adapter", "token": TOKEN},
    "no token": {"name": "org/closed"},
    "private": {"name": "org/closed", "token": TOKEN},
    "missing": {"name": "org/nothing", "token": TOKEN},
    "gated": {"name": "org/gated", "token": TOKEN},
    "revision": {"name": "org/name", "revision": "nowhere", "token": TOKEN},
    "pickles": {"name": "org/pickles", "token": TOKEN},
    "empty": {"name": "org/empty", "token": TOKEN},
    "broken": {"name": "org/broken", "token": TOKEN},
    "busy": {"name": "org/busy", "token": TOKEN},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A sharded model with copies of its weights in other formats, another revision, an adapter, bad ones."""
    folder = tmp_path_factory.mktemp("repositories")
    tiny.build_model().save_pretrained(folder / "main", max_shard_size="200KB")
    tiny.build_tokenizer().save_pretrained(folder / "main")
    beside = {
        "README.md": b"# A model",
        "pytorch_model.bin": b"a pickle",
        "model.fp16.safetensors": b"another copy",
        "original/params.json": b"{ }",
        "original/tokenizer.model": b"another tokenizer",
        "original/consolidated.00.pth": b"a pickle",
        "onnx/config.json": b"{}",
        "onnx/model.onnx": b"another copy",
        "figure.png": b"a picture",
    }
    tiny.save_checkpoint(folder / "tried", seed=1)
    base = AutoModelForCausalLM.from_pretrained(folder / "tried")
    base.name_or_path = base.config._name_or_path = "org/name"
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    main, tried, adapter = (contents(folder / name) for name in ("main", "tried", "adapter"))
    small = {name: data for name, data in tried.items() if "safetensors" not in name}
    return {
        "org/name": {"main": {**main, **beside}, "tried": tried},
        "org/adapter": {"main": {**adapter, "optimizer.pt": b"a pickle"}},
        "org/closed": {"main": tried},
        "org/gated": {"main": tried},
        "org/pickles": {"main": {**small, "pytorch_model.bin": b"a pickle"}},
        "org/empty": {"main": small},
        "org/broken": {"main": tried},
        "org/busy": {"main": tried},
        "org/sizes": {"main": tried},
    }


def session(home: Path, loads: dict, **environment: str) -> dict:
    environment = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), **environment}
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.hub_download_session", json.dumps(loads)],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(result.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def online(repositories, tmp_path_factory):
    """The hub after all loads, what came of them, and the cache."""
    hub = HubToRead(repositories)
    hub.busy = {"org/busy": [503, 429]}
    hub.gated, hub.private, hub.broken = {"org/gated"}, {"org/closed"}, {"org/broken"}
    home = tmp_path_factory.mktemp("home")
    found = session(home, LOADS, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")
    hub.close()
    return hub, found, home


def test_only_what_is_needed_is_downloaded(online, repositories):
    hub, _, home = online
    index = json.loads(repositories["org/name"]["main"]["model.safetensors.index.json"])
    shards = set(index["weight_map"].values())
    assert len(shards) == 3
    # "tried" holds its weights in a single file; both revisions are asked for by commit.
    assert hub.downloaded("org/name") == {
        *NEEDED, *shards, "model.safetensors.index.json", "model.safetensors"
    }  # fmt: skip
    assert hub.downloaded("org/adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    kept = [file.name for file in home.rglob("*") if file.suffix in {".bin", ".pt", ".pth", ".onnx", ".png"}]
    assert kept == []


def test_sizes_follow_from_the_configuration_alone(online):
    """Of an adapter, from that of its base."""
    hub, found, _ = online
    assert hub.downloaded("org/sizes") == {"config.json"}
    folders = {name: Path(folder) for name, folder in found["configs"].items()}
    assert (folders["org/adapter"] / "model.safetensors.index.json").exists()
    assert all((folder / "config.json").exists() for folder in folders.values())


@torch.no_grad()
def logits_of(model) -> float:
    return model.eval()(torch.arange(5, 25)[None]).logits.double().sum().item()


def test_what_is_downloaded_loads(online):
    _, found, _ = online
    expected = logits_of(tiny.build_model())
    assert found["main"] == {
        "name": "org/name",
        "logits": pytest.approx(expected, abs=1e-3),
        "tokens": len(tiny.build_tokenizer()),
        "template": tiny.CHATML,
        "adapter": False,
    }
    assert found["adapter"]["adapter"] and found["adapter"]["name"] == "org/name"
    assert abs(found["adapter"]["logits"] - expected) > 1e-3


def test_the_revision_acts(online):
    _, found, _ = online
    assert found["tried"]["logits"] == pytest.approx(logits_of(tiny.build_model(seed=1)), abs=1e-3)
    assert abs(found["tried"]["logits"] - found["main"]["logits"]) > 1e-3


def test_the_token_is_sent_to_every_address_that_may_need_it(online):
    hub, found, _ = online
    closed = [one for one in hub.requests if "org/closed" in one.path]
    assert {one.token for one in closed} == {"", TOKEN}
    assert {one.token for one in closed if "resolve" in one.path} == {TOKEN}
    assert "error" in found["no token"] and found["private"]["logits"] == found["tried"]["logits"]
    others = [one for one in hub.requests if "org/" in one.path and one not in closed]
    assert {one.token for one in others} == {TOKEN}


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (
            "missing",
            "ModelLoadError: 'org/nothing' is neither a folder here nor a model on the hub that this account",
        ),
        ("no token", "private models need a token. Check the spelling, or pass token='hf_...'"),
        ("gated", "ModelLoadError: The model 'org/gated' is gated and this account may not read it."),
        ("revision", "ModelLoadError: 'org/name' has no revision 'nowhere'."),
        ("pickles", "ModelLoadError: 'org/pickles' offers its weights as pickles only (pytorch_model.bin)."),
        ("empty", "ModelLoadError: 'org/empty' holds no weights."),
        ("broken", "nor whole in the local cache, and the hub answered with status 500."),
    ],
)
def test_what_cannot_be_downloaded(online, load, said):
    _, found, _ = online
    assert said in found[load]["error"]
    assert "\n" not in found[load]["error"]


def test_a_busy_hub_is_asked_again(online):
    """503, then 429, each with the second after which it is to be asked again; what is missing is asked for once."""
    hub, found, _ = online
    assert hub.busy["org/busy"] == [] and found["busy"]["logits"] == found["tried"]["logits"]
    asked = [one.path for one in hub.requests if one.path.startswith("/api/models/org/busy/revision")]
    assert len(asked) >= 3
    assert sum("org/nothing" in one.path for one in hub.requests) == 1


def test_without_a_network_the_cache_serves(online):
    hub, found, home = online
    before = len(hub.requests)
    loads = {name: LOADS[name] for name in ("main", "tried", "adapter", "missing", "revision")}
    again = session(home, loads, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    for name in ("main", "tried", "adapter"):
        assert again[name] == found[name]
    said = "HF_HUB_OFFLINE keeps this process from the hub"
    assert f"nor whole in the local cache, and {said}" in again["missing"]["error"]
    assert f"nor whole in the local cache at revision 'nowhere', and {said}" in again["revision"]["error"]
    assert len(hub.requests) == before


@pytest.mark.slow  # huggingface_hub waits for it
def test_a_hub_that_does_not_answer(online):
    hub, found, home = online
    loads = {name: LOADS[name] for name in ("main", "missing")}
    again = session(home, loads, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")
    assert again["main"] == found["main"], "what is in the cache loads all the same"
    assert "nor whole in the local cache, and the hub cannot be reached." in again["missing"]["error"]
