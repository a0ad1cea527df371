"""A manifest finds every damage: bytes, sizes, missing and foreign files, links, other checkpoints' manifests."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import pytest

from pantheraml.checkpoint.folder_files import Measured
from pantheraml.checkpoint.inspection import inspect_checkpoint
from pantheraml.checkpoint.manifest import problems, read_manifest, write_manifest
from pantheraml.checkpoint.resuming import damage, has_weights, newest_whole
from pantheraml.errors import CheckpointError, SaveError
from tests.checkpoint.runs import contents, save, tree, write
from tests.checkpoint.test_publish import as_nobody, open_the_way_to


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "run", 3)


def test_the_manifest_lists_every_file_and_what_it_is_about(folder):
    manifest = read_manifest(folder)
    assert manifest.about == {"epoch": 0.3, "cursor": {"samples": 12}, "ranks": 2, "step": 3}
    assert list(manifest.libraries) == [
        "python", "pantheraml", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes",
    ]  # fmt: skip
    assert {name: (file.size, file.sha256) for name, file in manifest.files.items()} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents(3).items()
    }
    assert manifest.total_bytes == sum(map(len, contents(3).values()))
    assert problems(folder) == []


def test_what_other_ranks_have_measured_is_listed_as_they_say_and_has_to_be_there(folder):
    theirs = {"optimizer/part-00000/__1_0.distcp": Measured(5, "as rank 1 has read it")}
    with pytest.raises(
        SaveError, match=r"__1_0\.distcp with 5 bytes, and rank 0 does not see it.*save_on_each_node"
    ):
        write_manifest(folder, {"step": 3}, theirs)
    (part,) = (folder / name for name in theirs)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"1234")
    with pytest.raises(SaveError, match="rank 0 does not see it"):
        write_manifest(folder, {"step": 3}, theirs)
    part.write_bytes(b"12345")
    assert write_manifest(folder, {"step": 3}, theirs).files[next(iter(theirs))] == theirs[next(iter(theirs))]
    assert [one.partition(" ")[0] for one in problems(folder)] == list(theirs)
    assert not has_weights(theirs) and has_weights(["__1_0.distcp"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def spoil_manifest(folder: Path, change, seal: bool = True) -> None:
    """Change the manifest's content; with ``seal``, as somebody would who knows its own SHA-256."""
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    change(content)
    seal_of = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": seal_of if seal else "0" * 64}))


def rename_entry(name: str):
    def change(content: dict) -> None:
        content["files"][name] = content["files"].pop("adapter_config.json")

    return change


MODEL = "adapter_model.safetensors"
DAMAGES = {
    "a byte": (
        lambda folder: flip(folder / MODEL),
        [f"{MODEL} was changed after it was saved: its SHA-256 is another."],
    ),
    "cut short": (
        lambda folder: os.truncate(folder / MODEL, 10),
        [f"{MODEL} has 10 bytes where manifest.json lists {len(contents(3)[MODEL])}."],
    ),
    "grown": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 8}\n'),
        ["adapter_config.json has 9 bytes where manifest.json lists 8."],
    ),
    "missing": (
        lambda folder: (folder / "rank_1/rng_state.pth").unlink(),
        ["rank_1/rng_state.pth is missing."],
    ),
    "two files swapped": (
        lambda folder: swap(folder / "adapter_config.json", folder / "trainer_state.json"),
        [
            "adapter_config.json has 12 bytes where manifest.json lists 8.",
            "trainer_state.json has 8 bytes where manifest.json lists 12.",
        ],
    ),
    "another save's weights": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b"x"),
        ["model-00001-of-00002.safetensors is not among the files that manifest.json lists."],
    ),
    "a link to the same bytes": (
        lambda folder: (
            shutil.copy(folder / MODEL, folder.parent / "copy"),
            (folder / MODEL).unlink(),
            (folder / MODEL).symlink_to(folder.parent / "copy"),
        ),
        [f"{MODEL} is a symbolic link, which no save leaves."],
    ),
    "a folder that is a link": (
        lambda folder: (
            shutil.move(folder / "rank_1", folder.parent / "rank_1"),
            (folder / "rank_1").symlink_to(folder.parent / "rank_1"),
        ),
        ["rank_1/rng_state.pth lies behind a symbolic link, which no save leaves."],
    ),
    "a pipe": (
        lambda folder: ((folder / MODEL).unlink(), os.mkfifo(folder / MODEL)),
        [f"{MODEL} is no plain file."],
    ),
    "a folder in a file's place": (
        lambda folder: ((folder / MODEL).unlink(), (folder / MODEL).mkdir()),
        [f"{MODEL} is missing."],
    ),
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        ["manifest.json is missing: the save did not end, or the file was removed."],
    ),
    "a manifest cut short": (
        lambda folder: os.truncate(folder / "manifest.json", 300),
        ["manifest.json is damaged or was cut short: it is no JSON."],
    ),
    "an empty manifest": (
        lambda folder: os.truncate(folder / "manifest.json", 0),
        ["manifest.json is damaged or was cut short: it is no JSON."],
    ),
    "a manifest that nests without end": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        ["manifest.json is damaged or was cut short: it is no JSON."],
    ),
    "a manifest of bytes": (
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\xff"),
        ["manifest.json is damaged: it is no text."],
    ),
    "a manifest that is a link": (
        lambda folder: (
            (folder / "manifest.json").rename(folder.parent / "m"),
            (folder / "manifest.json").symlink_to(folder.parent / "m"),
        ),
        ["manifest.json is a symbolic link, which no save leaves."],
    ),
    "a manifest that is a folder": (
        lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()),
        ["manifest.json is no plain file."],
    ),
    "a foreign manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"name": "web app"}'),
        ["manifest.json was not written by PantheraML."],
    ),
    "a manifest of the future": (
        lambda folder: spoil_manifest(folder, lambda content: content.update(version=2)),
        ["manifest.json has the layout of another version of PantheraML."],
    ),
    "a digit of the manifest": (
        lambda folder: spoil_manifest(folder, lambda content: content["about"].update(ranks=3), seal=False),
        ["manifest.json was changed after it was written."],
    ),
    "a manifest without sizes": (
        lambda folder: spoil_manifest(folder, lambda content: content["files"].update(a={"bytes": "many"})),
        ["manifest.json lacks entries that every manifest has."],
    ),
    "another step's manifest": (
        lambda folder: shutil.copy(save(folder.parent, 5) / "manifest.json", folder),
        ["manifest.json is of step 5, not of checkpoint-3."],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_named(folder, name):
    spoil, sentences = DAMAGES[name]
    spoil(folder)
    found = problems(folder)
    if name == "another step's manifest":  # whose files differ, too
        assert any("adapter_model.safetensors was changed" in problem for problem in found)
    assert [problem for problem in found if problem in sentences] == sentences
    assert name == "another step's manifest" or found == sentences
    assert inspect_checkpoint(folder).num_wrong > 0 or name == "no manifest"


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/hostname", "a/../../x", "./x", "..", "", "manifest.json"]
)
def test_paths_that_leave_the_checkpoint_are_not_followed(folder, name):
    (folder.parent / "outside.json").write_bytes(contents(3)["adapter_config.json"])
    spoil_manifest(folder, rename_entry(name))
    expected = f"{name} is listed in manifest.json, but lies outside of the checkpoint."
    assert problems(folder) == sorted(
        [expected, "adapter_config.json is not among the files that manifest.json lists."]
    )


def test_without_hashes_sizes_alone_are_compared(folder):
    flip(folder / MODEL)
    assert problems(folder, hashes=False) == []
    assert len(problems(folder)) == 1


def test_notes_beside_a_checkpoint_are_no_damage(folder):
    (folder / "notes.txt").write_text("the good one")
    (folder / ".DS_Store").write_text("")
    assert problems(folder) == []
    assert [str(one) for one in inspect_checkpoint(folder).findings if one.verdict == "note"] == [
        "note   .DS_Store: It came later, and no loader takes it.",
        "note   notes.txt: It came later, and no loader takes it.",
    ]


def test_a_copy_under_another_name_is_whole(folder, tmp_path):
    assert problems(Path(shutil.copytree(folder, tmp_path / "the best one"))) == []


def test_names_that_no_terminal_shows(tmp_path):
    folder = tmp_path / "checkpoint-1"
    name = os.fsdecode(b"model\xff\n.safetensors")
    write(folder, {name: b"1"})
    write_manifest(folder, {})
    assert problems(folder) == []
    (folder / name).unlink()
    assert problems(folder) == ["'model\\udcff\\n.safetensors' is missing."]
    write(folder, {name: b"2"})
    assert all(str(finding).isascii() for finding in inspect_checkpoint(folder).findings)


@pytest.mark.parametrize("make", ["link", "pipe"])
def test_what_is_no_plain_file_is_refused_when_saving(tmp_path, make):
    place = tmp_path / "x"
    (tmp_path / "checkpoint-1").mkdir()
    place = tmp_path / "checkpoint-1" / "x"
    place.symlink_to("/etc/hostname") if make == "link" else os.mkfifo(place)
    with pytest.raises(SaveError, match="no plain file"):
        write_manifest(tmp_path / "checkpoint-1", {})
    assert not (tmp_path / "checkpoint-1" / "manifest.json").exists()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_unreadable_files_are_named(folder):
    open_the_way_to(folder)
    (folder / MODEL).chmod(0)
    (folder / "rank_1").chmod(0)

    def action() -> None:
        raise RuntimeError(problems(folder))

    assert as_nobody(action) == (
        "RuntimeError: ['adapter_model.safetensors cannot be read (Permission denied).', "
        "'rank_1 is not among the files that manifest.json lists.', "
        "'rank_1/rng_state.pth cannot be read (Permission denied).']"
    )
    (folder / "rank_1").chmod(0o755)
    (folder / "manifest.json").chmod(0)

    def read() -> None:
        raise RuntimeError(problems(folder))

    assert as_nobody(read) == "RuntimeError: ['manifest.json cannot be read (Permission denied).']"
    for bits in (0, 0o444, 0o111):
        folder.chmod(bits)
        assert "cannot be read (Permission denied)" in as_nobody(read)
    folder.chmod(0o755)


def test_reading_a_manifest_says_what_to_do(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"is missing.*pantheraml verify"):
        read_manifest(folder)


def test_big_files_are_not_held_in_memory(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for number in range(4):
        with (folder / f"big{number}").open("wb") as stream:
            stream.truncate(60_000_000)
    tracemalloc.start()
    write_manifest(folder, {})
    assert problems(folder) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def random_damage(folder: Path, other_step: Path, chance: random.Random) -> None:
    """One random thing that happens to the files of a checkpoint, beside which there is one of another step."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, other = chance.sample(files, 2)
    data = path.read_bytes()
    place = chance.randrange(len(data))
    kind = chance.randrange(17)
    if kind <= 3:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
    elif kind == 4:
        os.truncate(path, place)
    elif kind == 5:
        path.write_bytes(data + chance.choice([b"\n", b"x", b"\0" * 4096]))
    elif kind == 6:
        path.write_bytes(data[:place] + chance.choice([b" ", b"\n", b'"', b"[", b"\xff"]) + data[place:])
    elif kind == 7:
        path.unlink()
        chance.choice([lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(other)])()
    elif kind == 8:
        swap(path, other)
    elif kind == 9:
        path.write_bytes(other.read_bytes())
    elif kind == 10:
        (folder / chance.choice(["notes", "model.safetensors", "a b.json", "optimizer.pt"])).write_bytes(data)
    elif kind == 11:
        (folder / "manifest.json").write_bytes(chance.randbytes(place))
    elif kind == 12:  # files of the other step, one or all
        names = sorted(tree(other_step))
        for name in chance.choice([[chance.choice(names)], names, [*names, "manifest.json"][:-1]]):
            shutil.copy(other_step / name, folder / name)
    elif kind == 13:
        swap(path, other_step / path.relative_to(folder))
    elif kind in (14, 15):  # a folder of somebody else's
        shutil.rmtree(folder)
        foreign = {f"{chance.choice(FOREIGN)}": chance.randbytes(place) for _ in range(chance.randrange(4))}
        write(folder, foreign or {"notes": b""})
    else:
        content = json.loads((folder / "manifest.json").read_text())
        part = chance.choice([content, content["files"], content["about"]])
        key = chance.choice(sorted(part))
        part[chance.choice([key, "../x", "\0"])] = chance.choice(
            [None, 1, "x", [], {}, {"bytes": 1}, -1, True]
        )
        spoil = (folder / "manifest.json").write_text
        spoil(json.dumps(content))


# What others write into folders of checkpoints.
FOREIGN = (
    "manifest.json",
    "model.safetensors",
    "trainer_state.json",
    "pytorch_model.bin",
    "config.json",
    "x/y.bin",
)


def relevant(folder: Path) -> object:
    """What must be as it was: the manifest's content, the listed files, and what a loader would take."""
    if not (folder / "manifest.json").is_file():  # reading a pipe would wait
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (ValueError, OSError):
        return None
    if any(path.is_symlink() for path in folder.rglob("*")):
        return None
    files = {
        name: data
        for name, data in tree(folder).items()
        if name not in ("manifest.json", "notes", "a b.json")
    }
    return json.dumps([manifest, {name: data.hex() for name, data in files.items()}], sort_keys=True)


@pytest.mark.parametrize("start", [0, 1000])
def test_a_hundred_random_damages_are_found_or_matter_to_nobody(tmp_path, start):
    good, other_step = save(tmp_path / "good", 3), save(tmp_path / "good", 5)
    before, unseen = relevant(good), 0
    for seed in range(start, start + 100):
        chance = random.Random(seed)
        run = tmp_path / "run"
        folder = Path(shutil.copytree(good, run / "checkpoint-3"))
        random_damage(folder, Path(shutil.copytree(other_step, run / "elsewhere")), chance)
        found = problems(folder)
        assert (not found) == (relevant(folder) == before), (seed, found)
        assert all(sentence.endswith(".") and len(sentence) > 15 for sentence in found)
        unseen += not found
        inspection = inspect_checkpoint(folder)
        assert all(str(finding) for finding in inspection.findings)
        choice = newest_whole(run)
        assert (choice.folder is None) == bool(damage(folder)), (seed, choice)
        assert bool(choice.folder) or choice.passed_over[0].name == "checkpoint-3"
        shutil.rmtree(run)
    assert unseen < 20
