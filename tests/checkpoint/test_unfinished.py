"""Checkpoints appear whole or not at all, whenever a process is killed and however full the disk is."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import traceback
from pathlib import Path

import pytest

from pantheraml.checkpoint.manifest import problems, write_manifest
from pantheraml.checkpoint.names import checkpoints
from pantheraml.checkpoint.pointers import BEST, LATEST, point, read_pointer
from pantheraml.checkpoint.resuming import newest_whole
from pantheraml.checkpoint.retention import retain
from pantheraml.checkpoint.unfinished import discard, publish, recover, saving, start_saving
from pantheraml.errors import SaveError
from tests.checkpoint.runs import (
    contents,
    hidden,
    in_a_process,
    kill_at,
    kill_beyond,
    save,
    tree,
    value_of,
    write,
)
from tests.checkpoint.test_publish import as_nobody, open_the_way_to
from tests.small_disk import small_disk

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def test_a_checkpoint_appears_when_it_is_published_and_latest_names_it(tmp_path):
    run = tmp_path / "outputs" / "run"
    with saving(run, 4) as unfinished:
        assert unfinished.folder.name == "checkpoint-4"
        assert unfinished.folder.parent.name.startswith(".unfinished-checkpoint-4-")
        write(unfinished.folder, contents(1))
        assert checkpoints(run) == []
        manifest = publish(unfinished, {"epoch": 0.5})
    assert manifest.about == {"epoch": 0.5, "step": 4}
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "latest.json"]
    assert value_of(run / "checkpoint-4") == 1
    assert read_pointer(run, LATEST).checkpoint == "checkpoint-4"


def test_files_get_the_permissions_of_ordinary_files(tmp_path):
    folder = save(tmp_path, 4)
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    modes = {path.stat().st_mode for path in (*folder.glob("*.json"), tmp_path / "latest.json")}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    assert folder.stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_checkpoint_of_the_same_step_is_replaced_as_a_whole(tmp_path):
    save(tmp_path, 4, 1)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_text("stale")
    save(tmp_path, 4, 2)
    assert value_of(tmp_path / "checkpoint-4") == 2
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_save_that_fails_leaves_no_trace(tmp_path, failure):
    save(tmp_path, 4, 1)
    before = tree(tmp_path)
    with pytest.raises(failure), saving(tmp_path, 4) as unfinished:
        write(unfinished.folder, contents(2))
        raise failure
    assert tree(tmp_path) == before and hidden(tmp_path) == []


def test_a_save_that_is_never_published_leaves_no_trace(tmp_path):
    with saving(tmp_path, 4) as unfinished:
        write(unfinished.folder, contents(2))
    discard(unfinished)
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_into_the_folder_they_are_told(tmp_path):
    """As ranks do: they know the path alone."""
    unfinished = start_saving(tmp_path, 4)
    path, files = str(unfinished.folder), contents(1)
    halves = [dict(list(files.items())[:2]), dict(list(files.items())[2:])]
    assert [in_a_process(lambda half=half: write(Path(path), half)) for half in halves] == [0, 0]
    publish(unfinished, {})
    assert value_of(tmp_path / "checkpoint-4") == 1


def assert_old_or_new(run: Path, old: set[tuple[int, float]], new: tuple[int, float]) -> bool:
    """Whatever can be seen of ``run`` is whole; returns whether the new one is what a run resumes from."""
    for folder in checkpoints(run):
        assert problems(folder) == []
        assert (int(folder.name.split("-")[1]), value_of(folder)) in {*old, new}
    chosen = newest_whole(run, end_saves=False).folder  # as a tool that only looks
    assert chosen is None or value_of(chosen) in {value for _, value in (*old, new)}
    chosen = newest_whole(run).folder
    assert chosen is not None and hidden(run) == []
    found = (int(chosen.name.split("-")[1]), value_of(chosen))
    assert found in {*old, new}
    return found == new


def check_killed(run: Path, old: set[tuple[int, float]], new: tuple[int, float]) -> bool:
    """After a kill, resuming finds the old or the new one, and the next save cleans up without anybody resuming."""
    other = Path(shutil.copytree(run, run.with_name("other"), symlinks=True))
    is_new = assert_old_or_new(run, old, new)
    save(other, 9)
    assert hidden(other) == []
    assert value_of(newest_whole(other).folder) == 9
    assert all(problems(folder) == [] for folder in checkpoints(other))
    shutil.rmtree(other)
    return is_new


@pytest.mark.parametrize("step", [2, 4])
def test_killed_before_every_write_rename_and_flush(tmp_path, step):
    """Step 4 is a new checkpoint; step 2 replaces the only one there is."""
    template = tmp_path / "template"
    save(template, 2, 20)
    seen = []
    for moment in range(1, 200):
        run = Path(shutil.copytree(template, tmp_path / "run"))

        def action(run=run, moment=moment) -> None:
            kill_at(moment, run)
            save(run, step, 40)

        code = in_a_process(action)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        seen.append(check_killed(run, {(2, 20)}, (step, 40)))
        shutil.rmtree(run)
    assert code == 0 and value_of(newest_whole(run).folder) == 40 and hidden(run) == []
    assert moment > 25  # several moments of each kind
    assert seen == sorted(seen) and seen[0] is False and seen[-1] is True, "once new, it stays new"


def test_killed_in_the_middle_of_every_file(tmp_path):
    template = tmp_path / "template"
    save(template, 2, 20)
    codes = []
    for size in [*range(0, 1400, 60), 100_000]:
        run = Path(shutil.copytree(template, tmp_path / "run"))

        def action(run=run, size=size) -> None:
            kill_beyond(size)
            save(run, 4, 40)

        codes.append(in_a_process(action))
        if codes[-1]:
            check_killed(run, {(2, 20)}, (4, 40))
        shutil.rmtree(run)
    assert codes[0] == codes[10] == -signal.SIGXFSZ and codes[-1] == 0


def test_killed_while_older_checkpoints_are_removed(tmp_path):
    template = tmp_path / "template"
    for step in (1, 2, 3, 4):
        save(template, step)
    point(template, BEST, 2, metric="eval_loss", value=0.5)
    for moment in range(1, 100):
        run = Path(shutil.copytree(template, tmp_path / "run"))

        def action(run=run, moment=moment) -> None:
            kill_at(moment, run)
            retain(run, 2)

        code = in_a_process(action)
        assert {"checkpoint-2", "checkpoint-4"} <= {path.name for path in checkpoints(run)}
        assert all(problems(folder) == [] for folder in checkpoints(run))
        assert value_of(newest_whole(run).folder) == 4 and hidden(run) == []
        shutil.rmtree(run)
        if code == 0:
            break
    assert code == 0 and moment > 10


def test_killed_while_best_is_written(tmp_path):
    template = tmp_path / "template"
    save(template, 1)
    save(template, 2)
    point(template, BEST, 1, metric="eval_loss", value=0.5)
    for moment in range(1, 20):
        run = Path(shutil.copytree(template, tmp_path / "run"))

        def action(run=run, moment=moment) -> None:
            kill_at(moment, run)
            point(run, BEST, 2, metric="eval_loss", value=0.25)

        code = in_a_process(action)
        best = read_pointer(run, BEST)
        assert (best.step, best.value) in ((1, 0.5), (2, 0.25))
        recover(run)
        assert hidden(run) == []
        shutil.rmtree(run)
        if code == 0:
            break
    assert moment > 4


def test_a_complete_save_that_was_killed_before_it_appeared_is_ended(tmp_path):
    save(tmp_path, 2, 20)
    unfinished = start_saving(tmp_path, 4)
    write(unfinished.folder, contents(40))
    write_manifest(unfinished.folder, {"step": 4})
    unfinished.close()  # as the end of a process does
    said = recover(tmp_path)
    assert said == [(unfinished.home.name, "A save that was killed was complete: it is checkpoint-4 now.")]
    assert read_pointer(tmp_path, LATEST).step == 4 and value_of(tmp_path / "checkpoint-4") == 40
    assert recover(tmp_path) == []


def test_an_old_complete_save_does_not_take_latest_back(tmp_path):
    unfinished = start_saving(tmp_path, 2)
    write(unfinished.folder, contents(20))
    write_manifest(unfinished.folder, {"step": 2})
    os.utime(unfinished.folder / "manifest.json", (1, 1))
    save(tmp_path, 4)  # while something still held the lock
    unfinished.close()
    choice = newest_whole(tmp_path)
    assert choice.folder.name == "checkpoint-4" and value_of(tmp_path / "checkpoint-2") == 20
    assert read_pointer(tmp_path, LATEST).step == 4


def test_a_save_of_a_living_process_is_left_alone(tmp_path):
    reader, writer = os.pipe()
    with saving(tmp_path, 4) as unfinished:
        write(unfinished.folder, contents(1))

        def other() -> None:
            save(tmp_path, 5)
            said = dict(recover(tmp_path))
            os.write(writer, said[unfinished.home.name].encode())

        # A forked child holds the locks of its parent too, but it cannot take what is held.
        assert in_a_process(other) == 0
        assert os.read(reader, 1000) == b"A save is under way in another process."
        publish(unfinished, {})
    os.close(reader)
    os.close(writer)
    assert [value_of(folder) for folder in checkpoints(tmp_path)] == [1, 5]
    assert hidden(tmp_path) == []


def test_two_processes_that_save_the_same_steps_at_once(tmp_path):
    def many(value: float) -> None:
        for step in range(1, 13):
            save(tmp_path, step % 3, value)
            retain(tmp_path, 2)

    children = []
    for value in (1.0, 2.0):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                many(value)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    choice = newest_whole(tmp_path)
    assert choice.folder is not None and value_of(choice.folder) in (1, 2)
    assert all(problems(folder) == [] for folder in checkpoints(tmp_path)) and hidden(tmp_path) == []
    assert codes == [0, 0]


def test_a_full_disk_at_every_moment_keeps_the_older_checkpoint(tmp_path):
    with small_disk(tmp_path / "disk", "300k") as disk:
        run = disk / "run"
        save(run, 2, 20)
        texts, codes = [], []
        for free in range(0, 64_000, 4096):
            filler = disk / "filler"
            room = os.statvfs(disk).f_bavail * 4096
            filler.write_bytes(b"0" * (room - free))
            try:
                save(run, 4, 40)
                codes.append("saved")
            except SaveError as error:
                codes.append("refused")
                texts.append(str(error))
            filler.unlink()
            assert hidden(run) == []
            assert value_of(checkpoints(run)[0]) == 20
            assert value_of(newest_whole(run).folder) in (20, 40)
            shutil.rmtree(run / "checkpoint-4", ignore_errors=True)
            if codes[-1] == "saved":
                point(run, LATEST, 2)
                break
        assert codes.count("refused") >= 3 and codes[-1] == "saved"
        for text in texts:
            assert "No space left on device" in text and "another disk" in text and "unfinished" not in text


def test_a_disk_that_is_full_for_the_pointer_alone(tmp_path, monkeypatch):
    from pantheraml.checkpoint import unfinished as module

    save(tmp_path, 2, 20)

    def full(run: Path, which: str, step: int, **others) -> None:
        raise SaveError(f"Saving to {which} stopped.", "Space.", "Free some.")

    monkeypatch.setattr(module, "point", full)
    with pytest.raises(SaveError, match="latest"):
        save(tmp_path, 4, 40)
    assert hidden(tmp_path) == [] and value_of(tmp_path / "checkpoint-4") == 40


def test_a_forbidden_run_folder_is_refused(tmp_path):
    open_the_way_to(tmp_path)
    tmp_path.chmod(0o555)
    message = as_nobody(lambda: save(tmp_path / "run", 4))
    assert message.startswith("SaveError") and "Permission denied" in message and "ls -ld" in message
    tmp_path.chmod(0o755)


def test_a_file_in_the_checkpoints_place_is_refused_and_kept(tmp_path):
    (tmp_path / "checkpoint-4").write_text("notes")
    with pytest.raises(SaveError, match=r"checkpoint-4 stopped: .*irectory"):
        save(tmp_path, 4)
    assert tree(tmp_path) == {"checkpoint-4": b"notes"}


def test_hidden_folders_of_others_are_left_as_they_are(tmp_path):
    (tmp_path / ".unfinished-thoughts").mkdir()
    assert recover(tmp_path) == [
        (".unfinished-thoughts", "This is no save of PantheraML, and was left as it is.")
    ]
    assert (tmp_path / ".unfinished-thoughts").is_dir()


def test_a_hidden_folder_without_anything_makes_nothing_the_latest(tmp_path):
    """A process that was killed while it made the folder: the checkpoint of that name is an older run's."""
    save(tmp_path, 4)
    (tmp_path / "latest.json").unlink()
    (tmp_path / ".unfinished-checkpoint-4-0badcafe").mkdir()
    assert recover(tmp_path) == [
        (".unfinished-checkpoint-4-0badcafe", "A save that was killed was unfinished: removed.")
    ]
    assert read_pointer(tmp_path, LATEST) is None and hidden(tmp_path) == []


def test_a_checkpoint_that_was_moved_aside_comes_back(tmp_path):
    """Its successor turned out to be damaged: the disk lost it, though it was flushed."""
    save(tmp_path, 4, 1)
    unfinished = start_saving(tmp_path, 4)
    write(unfinished.folder, contents(2))
    write_manifest(unfinished.folder, {"step": 4})
    (tmp_path / "checkpoint-4").rename(unfinished.home / "replaced-0badcafe")
    os.truncate(unfinished.folder / "trainer_state.json", 3)
    unfinished.close()
    assert value_of(newest_whole(tmp_path).folder) == 1 and hidden(tmp_path) == []


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_rename_that_fails_loses_nothing(tmp_path, monkeypatch, comes_back):
    save(tmp_path, 4, 1)
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        is_new = path.parent.name.startswith(".unfinished") and path.name == "checkpoint-4"
        is_back = path.name.startswith("replaced-") and not comes_back
        if (is_new and not Path(to).exists()) or is_back:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SaveError, match="Input/output error") as caught:
        save(tmp_path, 4, 2)
    monkeypatch.undo()
    if comes_back:
        assert "untouched" in str(caught.value) and hidden(tmp_path) == []
        assert value_of(tmp_path / "checkpoint-4") == 1
    else:
        assert f"wait in {tmp_path}/.unfinished-checkpoint-4-" in str(caught.value)
        assert value_of(newest_whole(tmp_path).folder) == 2 and hidden(tmp_path) == []
