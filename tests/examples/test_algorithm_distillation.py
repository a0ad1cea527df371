"""The example of any PyTorch model: room, learners, rows, model, and runs on one rank and two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState, GradientState

from pantheraml.errors import CheckpointError, ConfigError
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "algorithm_distillation"
sys.path.insert(0, str(FOLDER))  # as for the script itself
try:
    from darkroom import MOVES, Darkroom, best_return, split_goals
    from histories import EndlessBatches, HistoryRows
    from learner import learn, spread
    from rollout import curve_of, roll_out
    from settings import Settings, load_settings
    from train import Training
    from transformer import HistoryTransformer
finally:
    sys.path.remove(str(FOLDER))

TINY = dict(
    grid_size=5, episode_length=8, unseen_goals=4, learners_per_goal=2, learner_episodes=20, n_transit=32, tf_n_embd=16,
    train_batch_size=4, train_steps=6, warmup_steps=2, log_every=1, eval_every=0, save_every=3, rooms_per_unseen_goal=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_accelerator():
    """A run in this process leaves nothing to the next one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# The room.


def test_the_room_has_walls_and_pays_in_the_goal_alone():
    room = Darkroom(torch.tensor([0, 4, 8]), 3)
    assert room.reset().tolist() == [4, 4, 4]
    cells, rewards = room.step(torch.tensor([2, 0, 1]))  # up, stay, down
    assert cells.tolist() == [1, 4, 7] and rewards.tolist() == [0, 1, 0]
    cells, rewards = room.step(torch.tensor([4, 0, 1]))  # left, stay, into the wall
    assert cells.tolist() == [0, 4, 7] and rewards.tolist() == [1, 1, 0]
    assert room.reset().tolist() == [4, 4, 4]


@pytest.mark.parametrize(("size", "length"), [(9, 20), (4, 3)])
def test_the_best_return_is_that_of_walking_there(size, length):
    goals = torch.arange(size * size)
    room = Darkroom(goals, size)
    cells, earned = room.reset(), torch.zeros_like(goals)
    for _ in range(length):
        rows, columns = goals // size - cells // size, goals % size - cells % size
        move = torch.stack([rows.sign(), torch.where(rows == 0, columns.sign(), 0)], 1)
        actions = (move[:, None] == MOVES).all(-1).long().argmax(-1)
        cells, rewards = room.step(actions)
        earned += rewards
    assert torch.equal(best_return(goals, size, length), earned)


def test_goals_are_seen_or_unseen():
    seen, unseen = split_goals(9, 16, seed=1)
    assert len(unseen) == 16 and sorted([*seen.tolist(), *unseen.tolist()]) == list(range(81))
    assert not torch.equal(unseen, split_goals(9, 16, seed=2)[1])


# Learners and their histories.


def test_learners_learn():
    goals = torch.arange(81)
    histories = learn(goals, 9, 200, 20, range(200), seed=0)
    returns = histories.returns().double().mean(0)
    best = best_return(goals, 9, 20).double().mean()
    assert returns[:5].mean() < 0.2 * best < 0.95 * best < returns[-5:].mean()


def test_a_history_is_what_happened():
    goals = torch.tensor([3, 20, 24])
    told = learn(goals, 5, 12, 8, spread(12, 4), seed=3)
    whole = learn(goals, 5, 12, 8, range(12), seed=3)
    assert spread(12, 4) == [0, 4, 7, 11]
    assert all(torch.equal(one, every[:, [0, 4, 7, 11]]) for one, every in zip(told, whole, strict=True))
    room = Darkroom(goals, 5)
    for episode in range(12):
        cells = room.reset()
        for step in range(8):
            assert torch.equal(cells, whole.cells[:, episode, step].long())
            cells, rewards = room.step(whole.actions[:, episode, step].long())
            assert torch.equal(rewards, whole.rewards[:, episode, step].long())


def test_a_row_tells_each_step_what_came_before():
    told = learn(torch.tensor([12, 0]), 5, 3, 4, range(3), seed=0)
    row = HistoryRows(told)[0]
    assert row["actions"].tolist() == told.actions[0].flatten().tolist()
    for episode in range(3):
        of_episode = slice(4 * episode, 4 * episode + 4)
        actions, rewards = told.actions[0, episode].tolist(), told.rewards[0, episode].tolist()
        assert row["last_actions"][of_episode].tolist() == [0, *(action + 1 for action in actions[:-1])]
        assert row["last_rewards"][of_episode].tolist() == [0, *rewards[:-1]]
    assert 1 in row["last_rewards"], "nobody found the goal in which they start"


# The order of rows.


def test_every_epoch_has_each_row_once():
    rows = [row for batch in islice(EndlessBatches(10, 4, seed=5), 10) for row in batch]
    epochs = [rows[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("start", [4, 12, 20])
def test_the_order_goes_on_where_it_was(start):
    batches = list(islice(EndlessBatches(10, 4, seed=5), 10))
    assert list(islice(EndlessBatches(10, 4, seed=5, start=start), 5)) == batches[start // 4 :][:5]


def test_ranks_take_the_rows_of_a_step_between_them():
    alone = list(islice(EndlessBatches(10, 4, seed=5), 12))
    ranks = [list(islice(BatchSamplerShard(EndlessBatches(10, 4, seed=5), 3, rank), 4)) for rank in range(3)]
    assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == alone


# The model.


def tiny_model() -> HistoryTransformer:
    torch.manual_seed(0)
    return HistoryTransformer(size=5, max_steps=32, width=16, num_layers=2, num_heads=4)


def test_an_action_follows_from_what_came_before():
    model, row = tiny_model(), HistoryRows(learn(torch.tensor([7]), 5, 4, 8, range(4), seed=0))[[0]]
    inputs = [row[name] for name in ("cells", "last_actions", "last_rewards")]
    before = model(*inputs)
    for one in inputs:
        one[:, 20] = (one[:, 20] + 1) % 2
    after = model(*inputs)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.allclose(before[:, 20:], after[:, 20:])
    cache = model.empty_cache()
    steps = [model(*(one[:, step, None] for one in inputs), cache) for step in range(32)]
    torch.testing.assert_close(torch.cat(steps, 1), after, rtol=1e-5, atol=1e-6)


def test_a_rollout_is_its_room_s_own_and_trains_nothing():
    model, settings, goals = tiny_model(), Settings(**TINY), torch.tensor([12, 12, 3, 7])
    before = {name: one.clone() for name, one in model.state_dict().items()}
    together = roll_out(model, goals, range(4), settings)
    apart = [roll_out(model, goals[[number]], [number], settings)[0] for number in range(4)]
    assert together.shape == (4, 4) and torch.equal(together, torch.stack(apart))
    assert not torch.equal(together[0], together[1]), "two rooms with one goal have chances of their own"
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_curve_has_its_error():
    curve = curve_of(torch.tensor([[0, 4], [2, 4]]))
    assert curve.mean == [1, 4] and curve.error == [1, 0]
    assert curve_of(torch.tensor([[3, 1]])).error == [0, 0]


# Settings.


@pytest.mark.promise("E1")
def test_both_files_are_right_and_have_the_guides_keys():
    assert load_settings(FOLDER / "config/darkroom.yaml") == Settings()
    keys = (
        "mixed_precision",
        "gradient_accumulation_steps",
        "train_batch_size",
        "test_batch_size",
        "num_workers",
    )
    for file in (FOLDER / "config").iterdir():
        settings = load_settings(file)
        assert settings.model_fields_set >= {*keys, "tf_n_embd", "tf_n_layer", "n_transit"}, file
    settings = load_settings(file, ["mixed_precision=no", "learning_rate=1e-4"])
    assert (settings.mixed_precision, settings.learning_rate) == ("no", 1e-4)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("train_batch_size: 0\nnum_worker: 2\nmixed_precision: fp8\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file, ["seed", "tf_n_head=0", "warmup_steps=["])
    parts = [
        "wrong.yaml:1: train_batch_size",
        "wrong.yaml:2: there is no setting num_worker. Did you mean 'num_workers'?",
        "'fp16' or 'bf16'",
        "seed: settings are written key=value",
        "override tf_n_head: tf_n_head: Input should be",
        "override warmup_steps: this is not YAML",
    ]
    for part in parts:
        assert part in str(caught.value)
    file.write_text("n_transit: 50\ntf_n_head: 5\nlearner_episodes: 1\nunseen_goals: 81\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    for part in ("write n_transit=40", "5 heads", "learner_episodes of 2 or more", "none of 81 cells"):
        assert part in str(caught.value)


def test_a_launcher_s_precision_counts_unless_it_is_no(tmp_path, monkeypatch):
    for launched, said in (("bf16", "bf16"), ("no", "no")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        assert Training(Settings(**TINY), tmp_path).accelerator.mixed_precision == said
        AcceleratorState._reset_state(reset_partial_state=True)


# Runs.


def train(folder, resume=False, **changes):
    """A run on this rank; its last returns, and its weights in a row."""
    training = Training(Settings(**{**TINY, **changes}), folder, resume=resume)
    return training.run().mean, flat(training.plain_model.state_dict())


def flat(weights: dict[str, torch.Tensor]) -> list[float]:
    return torch.cat([one.flatten() for one in weights.values()]).tolist()


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def start(folder: Path, *words: str, launcher=(), seconds=250) -> subprocess.CompletedProcess[str]:
    """The script, as it is typed in ``folder``; it must end well."""
    done = subprocess.run(
        [sys.executable, *launcher, str(FOLDER / "train.py"), *words],
        cwd=folder, capture_output=True, text=True, timeout=seconds,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


class Killed(Training):
    """A run that ends in its fifth step, after the checkpoint of the third."""

    def _step(self, step, batches):
        if step == 5:
            raise KeyboardInterrupt
        return super()._step(step, batches)


@pytest.mark.promise("E3")
def test_a_run_that_goes_on_is_the_one_that_was_not_interrupted(tmp_path):
    _, weights = train(tmp_path / "whole", gradient_accumulation_steps=2)
    settings = Settings(**TINY, gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        Killed(settings, tmp_path / "killed").run()
    shutil.copytree(tmp_path / "killed", tmp_path / "by two")
    _, resumed = train(tmp_path / "killed", resume=True, gradient_accumulation_steps=2)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    assert resumed == weights
    assert json.loads((tmp_path / "killed/summary.json").read_text())["histories_per_step"] == 8
    with pytest.raises(CheckpointError, match=r"histories_per_step=8\..*This one has histories_per_step=4"):
        train(tmp_path / "killed", resume=True)
    (_, by_two), _ = run_ranks(2, train, tmp_path / "by two", True)
    assert by_two == pytest.approx(weights, rel=1e-5, abs=1e-6)


@pytest.mark.promise("E1")
def test_two_ranks_train_what_one_does(tmp_path):
    """Started by plain python, with everything that the main process says and writes, once."""
    words = [f"{name}={value}" for name, value in TINY.items()]
    done = start(tmp_path, "--num-processes=2", "--output=two", *words, "num_workers=1")
    for line in (
        "Number of processes: 2",
        "DistributedType.MULTI_CPU",
        "Histories a step: 4 x 2 x 1 = 8",
        "step 6: return",
    ):
        assert done.stdout.count(line) == 1, done.stdout
    returns, weights = train(tmp_path / "one", gradient_accumulation_steps=2)
    larger, _ = train(tmp_path / "larger", train_batch_size=8)
    one = losses(tmp_path / "one")
    for other in ("two", "larger"):
        assert losses(tmp_path / other) == pytest.approx(one, rel=1e-6), other
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert summary["returns"] == returns == larger and summary["processes"] == 2
    assert summary["timed_steps"] == 5 and summary["histories_per_step"] == 8
    state = torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and state["model"].keys() == tiny_model().state_dict().keys()
    assert flat(state["model"]) == pytest.approx(weights, rel=1e-5, abs=1e-6)
    lines = [json.loads(line)["step"] for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6, 6]


@pytest.mark.promise("E3")
def test_tensorboard_is_written_by_the_main_process_alone(tmp_path):
    pytest.importorskip("tensorboard")
    run_ranks(2, train, tmp_path)
    (file,) = tmp_path.rglob("events.out.tfevents*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file.parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert len(events.Scalars("last_return")) == 1


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0",
                   "--num_machines=1", "--mixed_precision=bf16", "--dynamo_backend=no"],
}  # fmt: skip


@pytest.mark.promise("E1")
@pytest.mark.slow
def test_other_launchers_start_the_same_run(tmp_path):
    """accelerate's precision is taken: its losses are near those of float32, and not the same."""
    for name, launcher in LAUNCHERS.items():
        done = start(
            tmp_path,
            f"--output={name}",
            *(f"{key}={value}" for key, value in TINY.items()),
            launcher=launcher,
        )
        assert done.stdout.count("Number of processes: 2") == 1, done.stdout
    train(tmp_path / "one", gradient_accumulation_steps=2)
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "torchrun") == pytest.approx(one, rel=1e-6)
    in_bf16 = losses(tmp_path / "accelerate")
    assert in_bf16 == pytest.approx(one, rel=2e-2) and in_bf16 != pytest.approx(one, rel=1e-6)


@pytest.mark.promise("E1")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_learns_within_its_context(tmp_path):
    """With the file that comes along, in rooms with goals that it was never trained on."""
    start(tmp_path, "--output=run", seconds=1700)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    returns, best = summary["returns"], summary["best_return"]
    assert len(returns) == 12 and returns[0] < 0.1 * best
    assert returns[-1] > 0.55 * best and sum(returns[8:]) > 2 * sum(returns[:4]), returns
