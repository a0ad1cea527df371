"""An optimizer's state in parts: what ranks have written for themselves, any number of ranks reads in its own way."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pantheraml.checkpoint import state_parts
from pantheraml.checkpoint.state_parts import clear_parts, is_in_parts, own_files, read_parts, write_parts
from pantheraml.errors import CheckpointError
from pantheraml.models.shares import whole
from tests.distributed.ranks import run_ranks
from tests.live_bytes import LiveBytes

# Of some, ranks have no row, or fewer than others; one is no larger than what ranks keep whole.
SHAPES = [(1, 3), (5, 3), (8, 40), (3,), (64, 100), (64, 90)]
STEP = torch.tensor(7.0)


def moment(number, shape):
    """Values that are those of one place in one tensor."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).view(shape).mul(0.5).add(number)


def shared(tensor, copies):
    ranks = dist.get_world_size()
    if copies == 1:
        return distribute_tensor(tensor, init_device_mesh("cpu", (ranks,)), [Shard(0)])
    mesh = init_device_mesh("cpu", (copies, ranks // copies))
    return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)])


def save(folder, copies):
    """Save on all ranks; bytes of tensors that this took at most, and what this rank has written."""
    state_parts._MOST = 8_000  # bytes of a rank in one file
    entries = {
        number: {"step": STEP, "exp_avg": shared(moment(number, shape), copies), "kept": "as it is"}
        for number, shape in enumerate(SHAPES)
    }
    groups = [{"lr": 0.5, "params": [0, 1, 2]}, {"lr": 0.25, "params": [3, 4, 5]}]
    with LiveBytes() as live:
        write_parts({"state": entries, "param_groups": groups}, folder, is_first=dist.get_rank() == 0)
    return live.most, own_files(folder)


def load(folders, copies):
    """What is read of each folder, whole."""
    found = []
    for folder in folders:
        weights = [torch.zeros(shape) for shape in SHAPES]
        if copies is not None:
            weights = [shared(weight, copies) for weight in weights]
        state = read_parts(folder, weights)
        for number, entry in state["state"].items():
            assert copies is None or type(entry["exp_avg"]) is type(weights[number])
            entry["exp_avg"] = whole(entry["exp_avg"]).numpy()
        found.append(state)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that four ranks have written, as one copy and as two, and what each rank said of it."""
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    return {
        folder: run_ranks(4, save, folder, copies) for copies, folder in zip((1, 2), folders, strict=True)
    }


@pytest.mark.parametrize(("ranks", "copies"), [(1, None), (2, 1), (2, None)])
def test_any_number_of_ranks_reads_it(saved, ranks, copies):
    for by_rank in run_ranks(ranks, load, list(saved), copies):
        for state in by_rank:
            assert [group["lr"] for group in state["param_groups"]] == [0.5, 0.25]
            for number, shape in enumerate(SHAPES):
                entry = state["state"][number]
                assert entry["step"].equal(STEP) and entry["kept"] == "as it is"
                assert torch.from_numpy(entry["exp_avg"]).equal(moment(number, shape))


def test_each_rank_writes_its_share_once(saved):
    size = sum(4 * torch.Size(shape).numel() for shape in SHAPES)
    for folder, said in saved.items():
        files = sorted(path for path in folder.rglob("*.distcp"))
        assert sorted(name for _, own in said for name in own) == [
            str(path.relative_to(folder)) for path in files
        ]
        assert len({path.parent for path in files}) > 1, "in parts"
        assert all(own for _, own in said)
        # Each tensor in a file has a header of torch.save, of 1.3 kB.
        assert size < sum(path.stat().st_size for path in files) < size + 1700 * 4 * len(SHAPES)
        assert all(most < 0.4 * size for most, _ in said), "no rank has all of it at once"


def test_what_cannot_be_read_is_said(saved, tmp_path):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(next(iter(saved)), folder)
    weights = [torch.zeros(shape) for shape in SHAPES]
    with pytest.raises(CheckpointError, match=r"has the state of 6 weights\. This run trains 5"):
        read_parts(folder, weights[:5])
    index = folder / "optimizer" / "part-00000" / ".metadata"
    whole_index = index.read_bytes()
    for damaged, said in (
        (pickle.dumps(print), "the index names builtins.print"),
        (
            b"ctorch.distributed.checkpoint.filesystem\nos\n.",
            "names torch.distributed.checkpoint.filesystem.os",
        ),
        (whole_index[:-20], "the index is damaged|truncated"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=said):
            read_parts(folder, weights)
    index.write_bytes(whole_index)
    lost = folder / "optimizer" / "part-00001" / "__2_0.distcp"
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*No such file.*part-00001/__2_0\.distcp"):
        read_parts(folder, weights)
    assert is_in_parts(folder)
    clear_parts(folder)
    assert not is_in_parts(folder) and not list(folder.iterdir())
