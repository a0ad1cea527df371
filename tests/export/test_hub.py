"""Uploads against a stand-in for the hub: what arrives loads, and failures say where the files are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pantheraml.checkpoint.manifest import has_manifest, problems
from tests import tiny
from tests.export.hub_stand_in import Hub
from tests.export.models import logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # The gguf library reads arrays out of a memory map.
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]


@pytest.fixture(scope="module")
def session(llama, tmp_path_factory):
    """The hub after ``hub_session`` ran, what that found, and its working folder."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "tmp").mkdir()
    hub = Hub()
    hub.busy = {"create": [503], "commit": [502]}
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    }
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.export.hub_session", str(llama), str(folder)],
        cwd=Path(__file__).parents[2],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    hub.shutdown()
    hub.server_close()
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return hub, json.loads(result.removeprefix("RESULT ")), folder


def download(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.promise("F10")
def test_an_adapter_arrives_and_loads(session, llama, tmp_path):
    hub, found, folder = session
    assert found["adapter"] == f"{hub.endpoint}/someone/adapter"
    assert "an adapter" in hub.messages
    got = download(hub.repos["someone/adapter"]["main"], tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), got).eval()
    assert logits(model).equal(torch.load(folder / "logits.pt"))
    assert AutoTokenizer.from_pretrained(got).chat_template == tiny.CHATML
    assert (got / "pantheraml.json").exists()


@pytest.mark.promise("F10")
def test_a_merged_model_arrives_loads_and_replaces_older_shards(session, tmp_path):
    hub, _, folder = session
    files = hub.repos["someone/merged"]["main"]
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(download(files, tmp_path)).eval()
    torch.testing.assert_close(logits(model), torch.load(folder / "logits.pt"), rtol=0, atol=1e-5)


def test_gguf_files_arrive_and_load(session, tmp_path):
    hub, found, folder = session
    assert found["gguf"] == f"{hub.endpoint}/someone/gguf"
    got = download(hub.repos["someone/gguf"]["main"], tmp_path)
    assert {path.name for path in got.glob("*.gguf")} == {"model-F32.gguf", "model-Q8_0.gguf"}
    model = AutoModelForCausalLM.from_pretrained(got, gguf_file="model-F32.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), torch.load(folder / "logits.pt"), rtol=0, atol=1e-5)
    assert found["wrong format"].startswith("NotYetError")


def test_branch_privacy_and_names_without_a_user(session):
    hub, _, _ = session
    assert hub.private["someone/short-name"] and not hub.private["someone/adapter"]
    assert "adapter_model.safetensors" in hub.repos["someone/short-name"]["tried"]
    assert hub.repos["someone/short-name"]["main"] == {}


def test_saving_and_pushing_at_once_keeps_the_local_folder(session):
    hub, _, folder = session
    assert hub.repos["someone/both"]["main"]["adapter_model.safetensors"] == (
        (folder / "both" / "adapter_model.safetensors").read_bytes()
    )


def test_a_wrong_token_or_name_shows_before_the_work(session):
    hub, found, _ = session
    assert found["wrong token"].startswith("SaveError") and "hf auth login" in found["wrong token"]
    assert "Nothing was saved yet" in found["wrong token"]
    assert found["wrong name"].startswith("SaveError") and "a/b/c" in found["wrong name"]
    assert found["wrong method"].startswith("ConfigError")
    assert "someone/new" not in hub.repos


def test_a_busy_hub_is_asked_again(session):
    """The first repository and the first commit were refused for a moment; "wrong token" was asked for once."""
    hub, found, _ = session
    assert hub.busy == {"create": [], "commit": []} and found["adapter"].endswith("someone/adapter")


def test_a_failed_upload_says_where_the_files_are(session, llama):
    _, found, folder = session
    assert found["no folder"].startswith("SaveError: There is no folder")
    assert f"All files are kept in {folder / 'both'}." in found["closed folder"]
    assert "403" in found["closed folder"]
    kept = Path(re.search(r"kept in (\S+)\.", found["closed"])[1])
    assert f"hf upload someone/closed {kept}" in found["closed"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), kept).eval()
    assert logits(model).equal(torch.load(folder / "logits.pt"))


def test_a_run_uploads_whole_checkpoints(session, tmp_path):
    hub, _, folder = session
    uploaded = download(hub.repos["someone/run"]["main"], tmp_path)
    for step in (1, 2):
        saved = folder / "run" / f"checkpoint-{step}"
        assert has_manifest(saved) and problems(saved) == []
        got = uploaded / saved.name
        assert has_manifest(got) and problems(got) == [], "the run goes on with what was uploaded, too"
    newest = (folder / "run" / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert (uploaded / "adapter_model.safetensors").read_bytes() == newest
    assert not [name for name in hub.repos["someone/run"]["main"] if "unfinished" in name]


def test_nothing_else_is_left_in_the_temporary_folder(session):
    _, _, folder = session
    assert len([path for path in (folder / "tmp").iterdir() if path.name.startswith("pantheraml")]) == 1


def test_offline_the_upload_is_refused_and_the_files_are_named(tmp_path, llama):
    from pantheraml.errors import SaveError
    from pantheraml.export.hub import push_folder

    with pytest.raises(SaveError, match=re.escape(str(tmp_path))):
        push_folder(tmp_path, "someone/offline", "hf_stand_in")
