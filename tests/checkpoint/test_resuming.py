"""What a run goes on from, what is passed over and why, and which checkpoints are kept."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pantheraml.checkpoint.names import checkpoints
from pantheraml.checkpoint.pointers import BEST, LATEST, Pointer, point, read_pointer
from pantheraml.checkpoint.resuming import newest_whole
from pantheraml.checkpoint.retention import retain
from pantheraml.checkpoint.unfinished import start_saving
from pantheraml.errors import CheckpointError
from tests.checkpoint.runs import contents, hidden, save, write


def names(folders) -> list[str]:
    return [folder.name for folder in folders]


def test_pointers_say_what_was_written(tmp_path):
    assert read_pointer(tmp_path, LATEST) is None
    save(tmp_path, 3)
    save(tmp_path, 6)
    point(tmp_path, BEST, 3, metric="eval_loss", value=1)
    assert read_pointer(tmp_path, LATEST) == Pointer("checkpoint-6", 6)
    assert read_pointer(tmp_path, BEST) == Pointer("checkpoint-3", 3, "eval_loss", 1.0)
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "checkpoint-3"
    with pytest.raises(CheckpointError, match=r"names checkpoint-9, and there is no such folder"):
        point(tmp_path, BEST, 9)
    assert read_pointer(tmp_path, BEST).step == 3


GOOD = {"format": "pantheraml-pointer", "checkpoint": "checkpoint-3", "step": 3}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cut short"),
        (json.dumps(GOOD)[:20], "cut short"),
        ("[" * 100_000, "cut short"),
        (b"\xff\xfe", "no text"),
        ('{"step": 3}', "not written by PantheraML"),
        ("[]", "not written by PantheraML"),
        (json.dumps({**GOOD, "checkpoint": "../elsewhere"}), "names no checkpoint of its folder"),
        (json.dumps({**GOOD, "checkpoint": "checkpoint-4"}), "names no checkpoint of its folder"),
        (json.dumps({**GOOD, "step": True}), "names no checkpoint of its folder"),
        (json.dumps({**GOOD, "metric": "loss", "value": "low"}), "no number"),
        (json.dumps({**GOOD, "checkpoint": "checkpoint-9", "step": 9}), "there is no such folder beside it"),
        ("pipe", "no plain file"),
        ("folder", "no plain file"),
    ],
)
def test_damaged_pointers_are_named_and_the_newest_whole_checkpoint_is_used(tmp_path, text, reason):
    save(tmp_path, 3)
    path = tmp_path / "latest.json"
    path.unlink()
    if text == "pipe":
        os.mkfifo(path)
    elif text == "folder":
        path.mkdir()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_pointer(tmp_path, LATEST)
    assert caught.value.need and "emove" in caught.value.fix
    choice = newest_whole(tmp_path)
    assert choice.folder.name == "checkpoint-3" and choice.is_checked
    assert [one.name for one in choice.passed_over] == ["latest.json"]
    assert reason in str(choice.passed_over[0])


def test_latest_comes_before_newer_ones(tmp_path):
    """A run that was resumed from an earlier checkpoint: later ones are of the run before."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert newest_whole(tmp_path).folder.name == "checkpoint-3"
    point(tmp_path, LATEST, 2)
    assert newest_whole(tmp_path).folder.name == "checkpoint-2"
    (tmp_path / "latest.json").unlink()
    assert newest_whole(tmp_path).folder.name == "checkpoint-3"


def test_damaged_checkpoints_are_passed_over_by_name(tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, step)
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-10" / "manifest.json").write_text("{")
    choice = newest_whole(tmp_path)
    assert choice.folder.name == "checkpoint-9" and choice.is_checked
    assert list(map(str, choice.passed_over)) == [
        "checkpoint-11 is passed over: trainer_state.json is missing.",
        "checkpoint-10 is passed over: manifest.json is damaged or was cut short: it is no JSON.",
    ]
    data = bytearray((tmp_path / "checkpoint-9" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "checkpoint-9" / "adapter_model.safetensors").write_bytes(data)
    assert newest_whole(tmp_path).folder.name == "checkpoint-2"
    assert newest_whole(tmp_path, hashes=False).folder.name == "checkpoint-9"


def test_unfinished_saves_are_named(tmp_path):
    save(tmp_path, 2)
    unfinished = start_saving(tmp_path, 4)
    write(unfinished.folder, contents(4))
    name = unfinished.home.name
    assert [one.name for one in newest_whole(tmp_path).passed_over] == [name]  # under way
    unfinished.close()
    assert newest_whole(tmp_path, end_saves=False).passed_over == [] and hidden(tmp_path) == [name]
    choice = newest_whole(tmp_path)
    assert choice.folder.name == "checkpoint-2"
    assert list(map(str, choice.passed_over)) == [
        f"{name} is passed over: A save that was killed was unfinished: removed."
    ]
    assert hidden(tmp_path) == []


def test_nothing_to_resume_from(tmp_path):
    assert newest_whole(tmp_path / "none").folder is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    assert newest_whole(tmp_path).folder is None


def plain(run, step: int, without: str = "") -> None:
    files = {name: data for name, data in contents(step).items() if name != without}
    write(run / f"checkpoint-{step}", files)


def test_plain_checkpoints_are_taken_unchecked(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "latest.json").unlink()
    plain(tmp_path, 5)
    choice = newest_whole(tmp_path)
    assert choice.folder.name == "checkpoint-5" and not choice.is_checked


@pytest.mark.parametrize("without", ["trainer_state.json", "adapter_model.safetensors", "cut"])
def test_plain_checkpoints_without_state_or_weights_are_not_taken(tmp_path, without):
    save(tmp_path, 3)
    plain(tmp_path, 5, without)
    (tmp_path / "latest.json").unlink()
    if without == "cut":
        os.truncate(tmp_path / "checkpoint-5" / "adapter_model.safetensors", 200)
    choice = newest_whole(tmp_path)
    assert choice.folder.name == "checkpoint-3"
    assert {
        "trainer_state.json": "trainer_state.json is missing.",
        "adapter_model.safetensors": "No weights are in it",
        "cut": "adapter_model.safetensors has 200 bytes where its header promises",
    }[without] in str(choice.passed_over[0])


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 9, 10]),
        (0, None, [1, 2, 3, 9, 10]),
        (5, None, [1, 2, 3, 9, 10]),
        (2, None, [9, 10]),
        (1, None, [10]),
        (2, 1, [1, 10]),
        (1, 2, [2, 10]),
        (3, 2, [2, 9, 10]),
        (1, 10, [10]),
    ],
)
def test_retention_counts_as_transformers_does(tmp_path, limit, best, left):
    from transformers.trainer_utils import rotate_checkpoints

    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2, 3, 9, 10):
        save(run, step)
    if best:
        point(run, BEST, best, metric="eval_loss", value=1.0)
    shutil.copytree(run, other)
    removed = retain(run, limit)
    assert names(checkpoints(run)) == [f"checkpoint-{step}" for step in left]
    assert len(removed) == 5 - len(left) and hidden(run) == []
    rotate_checkpoints(str(other), limit, str(other / f"checkpoint-{best}") if best else None)
    assert names(checkpoints(other)) == names(checkpoints(run))


def test_retention_keeps_what_pointers_name_and_what_is_being_written(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    point(tmp_path, LATEST, 1)
    unfinished = start_saving(tmp_path, 4)
    assert names(retain(tmp_path, 1)) == ["checkpoint-2", "checkpoint-3"]
    assert unfinished.folder.is_dir()
    unfinished.close()


def test_retention_with_a_pointer_to_nowhere_and_one_that_cannot_be_read(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    point(tmp_path, BEST, 1)
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert names(retain(tmp_path, 1)) == ["checkpoint-2"]
    save(tmp_path, 4)
    (tmp_path / "best.json").write_text("{")
    assert retain(tmp_path, 1) == []
    assert "No older checkpoint is removed" in caplog.text and "best.json" in caplog.text
