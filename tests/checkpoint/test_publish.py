"""A folder is saved whole or not at all: full disks, missing permissions and kills are real here."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pantheraml.checkpoint.publish import ensure_can_save, publish_folder, recover
from pantheraml.errors import SaveError
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(target: Path, **files: str) -> None:
    with publish_folder(target) as folder:
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh Python process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )


def test_a_new_folder_appears_with_its_parents_and_nothing_else(tmp_path):
    save(tmp_path / "a" / "b", config_dot_json="1", sub__file="2")
    assert tree(tmp_path) == {"a/b/config.json": b"1", "a/b/sub/file": b"2"}


def test_files_get_the_permissions_of_ordinary_files(tmp_path):
    save(tmp_path / "out", config_dot_json="1")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "out" / "config.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_other_things_in_the_folder_stay(tmp_path):
    save(tmp_path, config_dot_json="old", checkpoint_1__x="kept", notes="kept", pytorch_model_dot_bin="kept")
    save(tmp_path, config_dot_json="new")
    assert tree(tmp_path) == {
        "config.json": b"new",
        "checkpoint_1/x": b"kept",
        "notes": b"kept",
        "pytorch_model.bin": b"kept",
    }


def test_stale_shards_and_index_go_when_one_file_replaces_them(tmp_path):
    old = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    old |= {"model.safetensors.index.json", "adapter_model.safetensors", "checkpoint-3/model.safetensors"}
    for name in old:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    save(tmp_path, model_dot_safetensors="new")
    assert set(tree(tmp_path)) == {
        "model.safetensors",
        "adapter_model.safetensors",
        "checkpoint-3/model.safetensors",
    }


def test_an_adapter_does_not_remove_a_full_model(tmp_path):
    save(tmp_path, model_dot_safetensors="full")
    save(tmp_path, adapter_model_dot_safetensors="adapter")
    assert set(tree(tmp_path)) == {"model.safetensors", "adapter_model.safetensors"}


def test_any_error_leaves_the_old_files_and_no_trace(tmp_path):
    save(tmp_path / "out", config_dot_json="old")
    with pytest.raises(ZeroDivisionError), publish_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("new")
        1 / 0
    with pytest.raises(KeyboardInterrupt), publish_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("new")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"out/config.json": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_first_save_makes_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), publish_folder(tmp_path / "out"):
        1 / 0
    assert list(tmp_path.iterdir()) == []


def test_errors_that_are_not_about_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(ConnectionResetError), publish_folder(tmp_path / "out"):
        raise ConnectionResetError(errno.ECONNRESET, "the network")


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", config_dot_json="1")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "real") == {"config.json": b"1"}


@pytest.mark.parametrize("writer", ["python", "safetensors", "tokenizers"])
def test_full_disk_keeps_the_old_model(tmp_path, writer):
    with small_disk(tmp_path / "disk", "3m") as disk:
        target = disk / "model"
        with publish_folder(target) as folder:
            save_file({"x": torch.ones(200_000)}, folder / "model.safetensors")
        before = tree(disk)
        with pytest.raises(SaveError) as caught, publish_folder(target) as folder:
            if writer == "python":
                (folder / "model.safetensors").write_bytes(b"0" * 4_000_000)
            elif writer == "safetensors":
                save_file({"x": torch.zeros(1_000_000)}, folder / "model.safetensors")
            else:
                from tokenizers import Tokenizer
                from tokenizers.models import WordLevel

                words = {f"{'long' * 20}{number}": number for number in range(40_000)}
                Tokenizer(WordLevel(words, "?")).save(str(folder / "tokenizer.json"))
        assert "No space left on device" in caught.value.got
        assert "untouched" in caught.value.need and "MB is free" in caught.value.need
        assert "another disk" in caught.value.fix
        assert tree(disk) == before
        assert load_file(target / "model.safetensors")["x"].sum() == 200_000


def test_a_mount_point_can_be_the_target(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        save(disk, config_dot_json="1")
        assert tree(disk) == {"config.json": b"1"}
        assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_too_small_a_disk_is_refused_before_the_work(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        ensure_can_save(disk / "new" / "model", 900_000)
        with pytest.raises(SaveError, match=r"needs 5\.0 GB and 1\.0 MB is free") as caught:
            ensure_can_save(disk / "new" / "model", 5_000_000_000)
        assert "df -h" in caught.value.fix
        assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_refused_before_the_work(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(SaveError, match="Read-only file system"):
            ensure_can_save(disk / "model")


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_file_size_limit_keeps_the_old_model(tmp_path, writer):
    code = """
        import resource, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from pantheraml.checkpoint.publish import publish_folder
        from pantheraml.errors import SaveError
        target, writer = Path(sys.argv[1]), sys.argv[2]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with publish_folder(target) as folder:
                if writer == "python":
                    (folder / "model.safetensors").write_bytes(b"0" * 200_000)
                else:
                    save_file({"x": torch.zeros(50_000)}, folder / "model.safetensors")
        except SaveError as error:
            print(error)
    """
    save(tmp_path / "out", model_dot_safetensors="old")
    done = run(code, tmp_path / "out", writer)
    assert "File too large" in done.stdout and "max_shard_size" in done.stdout, done.stderr
    assert tree(tmp_path) == {"out/model.safetensors": b"old"}


def open_the_way_to(folder: Path) -> None:
    """Let other users reach ``folder``: pytest keeps its folders, and each of its workers', to one user."""
    for path in (folder, *folder.parents):
        if path == Path(tempfile.gettempdir()):
            break
        path.chmod(0o755)


def as_nobody(action) -> str:
    """Run ``action`` in a forked child without root's rights; returns the error it raised, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "no error"
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_missing_permission_is_refused_before_the_work(tmp_path):
    open_the_way_to(tmp_path)
    target = tmp_path / "out"
    save(target, config_dot_json="old")
    target.chmod(0o555)
    message = as_nobody(lambda: ensure_can_save(target))
    assert message.startswith("SaveError") and "Permission denied" in message and "ls -ld" in message
    assert tree(tmp_path) == {"out/config.json": b"old"}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_writable_folder_in_a_forbidden_one_is_saved_to(tmp_path):
    open_the_way_to(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    target.chmod(0o777)
    tmp_path.chmod(0o555)
    assert as_nobody(lambda: save(target, config_dot_json="new")) == "no error"
    tmp_path.chmod(0o755)
    assert tree(tmp_path) == {"out/config.json": b"new"}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_failure_between_two_renames_keeps_the_new_files_for_later(tmp_path):
    open_the_way_to(tmp_path)
    tmp_path.chmod(0o777)
    target = tmp_path / "out"
    (target / "sub").mkdir(parents=True)
    target.chmod(0o777)
    (target / "sub").chmod(0o555)
    message = as_nobody(lambda: save(target, config_dot_json="new", sub__config_dot_json="new"))
    assert message.startswith("SaveError") and "for the next save" in message
    (target / "sub").chmod(0o777)
    recover(target)
    assert tree(tmp_path) == {"out/config.json": b"new", "out/sub/config.json": b"new"}


def test_a_file_where_the_folder_belongs_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    for target in (tmp_path / "out", tmp_path / "out" / "model"):
        with pytest.raises(SaveError, match="Not a directory") as caught:
            ensure_can_save(target)
        assert "another folder name" in caught.value.fix


def test_a_folder_where_a_file_belongs_is_refused_before_anything_moves(tmp_path):
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"config\.json"):
        save(tmp_path / "out", adapter_config_dot_json="new", config_dot_json="new")
    assert tree(tmp_path) == {}


KILLED = """
    import os, signal, sys, torch
    from pathlib import Path
    from safetensors.torch import save_file
    from pantheraml.checkpoint.publish import publish_folder
    with publish_folder(sys.argv[1]) as folder:
        save_file({"x": torch.full((1000,), 2.0)}, folder / "model-00001-of-00002.safetensors")
        if sys.argv[2] == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
        save_file({"y": torch.full((1000,), 2.0)}, folder / "model-00002-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text("{}")
        moves, move = [], Path.replace
        def replace(path, to):
            moves.append(to)
            if len(moves) == 3:  # the plan and the first shard are in place
                os.kill(os.getpid(), signal.SIGKILL)
            return move(path, to)
        Path.replace = replace
"""


def test_killed_while_writing_the_old_model_loads_and_the_next_save_cleans_up(tmp_path):
    target = tmp_path / "out"
    with publish_folder(target) as folder:
        save_file({"x": torch.ones(1000)}, folder / "model.safetensors")
    before = tree(target)
    assert run(KILLED, target, "writing").returncode == -signal.SIGKILL
    assert tree(target) == before
    assert load_file(target / "model.safetensors")["x"].sum() == 1000
    assert len(list(tmp_path.iterdir())) == 2  # the killed save's hidden folder
    save(tmp_path / "another", config_dot_json="new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "out"]
    assert tree(target) == before


def test_killed_before_its_folder_was_locked(tmp_path):
    """While another process makes a folder, and takes it for its own a moment later."""
    (tmp_path / ".pantheraml-saving-0123456789ab").mkdir()
    save(tmp_path / "out", config_dot_json="1")
    assert tree(tmp_path) == {"out/config.json": b"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_saves_beside_one_another_take_nothing_from_each_other(tmp_path):
    def saves(number):
        for turn in range(20):
            save(tmp_path / f"out{number}", config_dot_json=str(turn))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(saves, range(4)))
    assert tree(tmp_path) == {f"out{number}/config.json": b"19" for number in range(4)}
    assert len(list(tmp_path.iterdir())) == 4


def test_killed_between_two_renames_the_save_is_finished_later(tmp_path):
    target = tmp_path / "out"
    with publish_folder(target) as folder:
        save_file({"x": torch.ones(1000)}, folder / "model.safetensors")
    assert run(KILLED, target, "moving").returncode == -signal.SIGKILL
    assert "model-00001-of-00002.safetensors" in tree(target)
    assert "model-00002-of-00002.safetensors" not in tree(target)
    recover(target)
    assert load_file(target / "model-00002-of-00002.safetensors")["y"].sum() == 2000
    assert set(tree(tmp_path)) == {
        "out/model-00001-of-00002.safetensors",
        "out/model-00002-of-00002.safetensors",
        "out/model.safetensors.index.json",
    }


def test_a_running_save_is_left_alone_by_another(tmp_path):
    with publish_folder(tmp_path / "one") as folder:
        (folder / "config.json").write_text("1")
        save(tmp_path / "two", config_dot_json="2")
        recover(tmp_path / "one")
    assert tree(tmp_path) == {"one/config.json": b"1", "two/config.json": b"2"}
