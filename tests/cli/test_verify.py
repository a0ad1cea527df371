"""``pantheraml verify``: a line for each checked thing, a verdict, an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pantheraml.checkpoint.pointers import BEST, point
from pantheraml.checkpoint.unfinished import start_saving
from pantheraml.models.tensor_header import BadHeader, read_header
from tests.checkpoint.runs import contents, save, tree, write
from tests.cli.test_app import cli  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verify(cli):  # noqa: F811
    """``verify(path, ...)`` -> exit code, lines; nothing goes to standard error, and no file changes."""

    def call(path: Path, *words: str) -> tuple[int, list[str]]:
        before = tree(path)
        code, out, err = cli("verify", str(path), *words)
        assert err == "" and tree(path) == before
        return code, out.splitlines()

    return call


def test_a_whole_checkpoint(verify, tmp_path):
    folder = save(tmp_path, 3)
    code, lines = verify(folder)
    assert code == 0
    assert lines[0].startswith("ok     manifest.json: 4 files, ")
    assert "every size and SHA-256 agrees; epoch 0.3, ranks 2, step 3, python 3." in lines[0]
    assert lines[1:] == [
        "ok     adapter_model.safetensors: 2 tensors: 2 F32 [8, 8].",
        "ok     adapter_config.json: It can be read.",
        "ok     trainer_state.json: It can be read.",
        "checkpoint-3 is whole.",
    ]
    code, lines = verify(folder, "--load")
    assert code == 0 and "2 F32 [8, 8]; all of them load." in lines[1]


def test_a_damaged_checkpoint_says_what_and_what_to_do(verify, tmp_path):
    folder = save(tmp_path, 3)
    (folder / "trainer_state.json").write_text("{")
    os.truncate(folder / "adapter_model.safetensors", 100)
    code, lines = verify(folder)
    assert code == 1
    wrong = [line for line in lines if line.startswith("wrong")]
    assert len(wrong) == 4
    assert (
        "wrong  checkpoint-3: adapter_model.safetensors has 100 bytes where manifest.json lists" in wrong[0]
    )
    assert "wrong  trainer_state.json: It is damaged or was cut short: it is no JSON." in wrong
    assert lines[-1].startswith(
        "checkpoint-3 is not what was saved: 4 things are wrong. Copy the named files again"
    )
    assert f"pantheraml verify {tmp_path}" in lines[-1]


def test_a_run_folder(verify, tmp_path, monkeypatch):
    save(tmp_path, 3)
    save(tmp_path, 6)
    point(tmp_path, BEST, 3, metric="eval_loss", value=0.5)
    monkeypatch.chdir(tmp_path)
    code, lines = verify(Path())
    assert code == 0
    assert lines[-3:] == [
        "ok     latest.json: checkpoint-6.",
        "ok     best.json: checkpoint-3, eval_loss 0.5.",
        "Nothing is wrong with the 2 checkpoints. A run resumes from checkpoint-6.",
    ]
    assert [line for line in lines if not line.startswith((" ", "ok", "Nothing"))] == [
        "checkpoint-3:",
        "checkpoint-6:",
    ]


def test_a_run_folder_with_damage(verify, tmp_path):
    for step in (3, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoint-6" / "rank_1" / "rng_state.pth").unlink()
    (tmp_path / "best.json").write_text("{")
    start_saving(tmp_path, 9).close()
    code, lines = verify(tmp_path)
    assert code == 1
    assert "  wrong  checkpoint-6: rank_1/rng_state.pth is missing." in lines
    assert any(line.startswith("wrong  best.json: ") and "Remove the file" in line for line in lines)
    assert any(line.startswith("note   .unfinished-checkpoint-9-") for line in lines)
    assert lines[-1] == (
        "Not whole: checkpoint-6; copy again or remove. The pointers: one thing is wrong. "
        "A run resumes from checkpoint-3."
    )


def test_a_run_with_nothing_to_resume_from(verify, tmp_path):
    (save(tmp_path, 3) / "adapter_config.json").unlink()
    code, lines = verify(tmp_path)
    assert code == 1 and lines[-1].endswith("A run would start anew.")


def adapter(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name.replace("__", "."): value for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text("{}")
    return folder


EMPTY, FULL = np.zeros((0,), np.float32), np.zeros((8, 8), np.float32)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "It holds no tensors: nothing of the adapter was saved."),
        (
            {"l__lora_A__weight": EMPTY, "l__lora_B__weight": EMPTY},
            "It holds 2 tensors without a single value",
        ),
        (
            {"l__lora_A__weight": FULL, "l__lora_B__weight": EMPTY},
            "It holds 1 lora_B tensors without a single value",
        ),
        (
            {"l__lora_A__weight": EMPTY, "l__lora_B__weight": FULL},
            "It holds 1 lora_A tensors without a single value",
        ),
    ],
)
def test_an_empty_adapter_is_wrong(verify, tmp_path, tensors, text):
    code, lines = verify(adapter(tmp_path / "adapter", **tensors))
    assert code == 1
    assert any(line.startswith(f"wrong  adapter_model.safetensors: {text}") for line in lines)


def test_a_saved_adapter_without_a_manifest(verify, tmp_path):
    folder = adapter(tmp_path / "adapter", l__lora_A__weight=FULL, l__lora_B__weight=FULL)
    code, lines = verify(folder, "--load")
    assert code == 0
    assert lines[0] == "note   manifest.json: There is none: sizes and SHA-256 cannot be compared."
    assert lines[-1] == "Nothing is wrong with adapter that can be seen."
    (folder / "adapter_config.json").unlink()
    code, lines = verify(folder)
    assert code == 1 and any("wrong  adapter_config.json: It is missing" in line for line in lines)


def test_a_plain_checkpoint_without_its_state(verify, tmp_path):
    write(tmp_path / "checkpoint-5", {**contents(5), "trainer_state.json": b"{"})
    code, lines = verify(tmp_path / "checkpoint-5")
    assert code == 1 and [line for line in lines if line.startswith("wrong")] == [
        "wrong  trainer_state.json: It is damaged or was cut short: it is no JSON."
    ]
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-5" / "adapter_model.safetensors").unlink()
    code, lines = verify(tmp_path / "checkpoint-5")
    assert code == 1 and len([line for line in lines if line.startswith("wrong  checkpoint-5: ")]) == 2


def test_a_model_in_shards(verify, tmp_path, llama, capsys):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "model", max_shard_size="50kB")
    capsys.readouterr()  # its progress bars
    code, lines = verify(tmp_path / "model", "--load")
    index = next(line for line in lines if "index.json" in line)
    assert code == 0 and index.startswith("ok") and "tensors in" in index
    first = min((tmp_path / "model").glob("model-00001*"))
    first.unlink()
    code, lines = verify(tmp_path / "model")
    assert code == 1
    assert any(
        line.startswith("wrong  model.safetensors.index.json: It lists") and first.name in line
        for line in lines
    )


def header(path: Path, entries: object, data: bytes = b"") -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("entries", "data", "reason"),
    [
        ({"a": F32}, b"123", "has .* bytes where its header promises"),
        ({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"123456", "overlap or leave gaps"),
        ({"a": {**F32, "data_offsets": [4, 8]}}, b"12345678", "overlap or leave gaps"),
        ({"a": {**F32, "shape": [2]}}, b"1234", "gives 'a' a size that is not that of its shape"),
        ({"a": {**F32, "data_offsets": [4, 0]}}, b"", "no readable safetensors header"),
        ({"a": {**F32, "shape": [-1]}}, b"1234", "no readable safetensors header"),
        ({"a": {"dtype": "F32"}}, b"1234", "no readable safetensors header"),
        ({"a": 3}, b"1234", "no readable safetensors header"),
        ([1], b"1234", "no readable safetensors header"),
    ],
)
def test_headers_that_do_not_fit_their_file(tmp_path, entries, data, reason):
    header(tmp_path / "x.safetensors", entries, data)
    with pytest.raises(BadHeader, match=reason):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "data", [b"", b"1234567", b"\xff" * 8, b"\xff" * 4000, b"version https://git-lfs.github.com"]
)
def test_files_without_a_header(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(BadHeader, match="no readable safetensors header"):
        read_header(tmp_path / "x.safetensors")


def test_headers_are_read_as_safetensors_reads_them(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    dtypes = [
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.int64,
    ]
    save_torch({str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in dtypes}, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert {name: tensor.size for name, tensor in found.items()} == {
        str(dtype): 6 * dtype.itemsize for dtype in dtypes
    }


def test_a_folder_that_is_not_there(cli, tmp_path):  # noqa: F811
    code, out, err = cli("verify", str(tmp_path / "none"))
    assert (code, out) == (2, "")
    assert (
        err.startswith(f"pantheraml: There is no folder '{tmp_path / 'none'}'.")
        and "pantheraml verify" in err
    )
    code, lines, _ = cli("verify", str(tmp_path))
    assert code == 1 and "No weights are in it" in lines


def test_it_imports_no_torch(tmp_path):
    folder = save(tmp_path, 3)
    program = (
        "import sys\nfrom pantheraml.cli.app import main\n"
        f"try: main(['verify', {str(folder)!r}])\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] in ("0 False False", "None False False"), done.stderr
