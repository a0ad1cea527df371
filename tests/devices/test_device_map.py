"""The planner against every possible split, one by one, with sizes counted anew here."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pantheraml.devices.device_map import describe, fits, interleaved, place
from pantheraml.devices.model_parts import ModelParts, PartSizes
from pantheraml.devices.stage_split import CONTEXT_BYTES, RECOMPUTE_TIME
from pantheraml.errors import ConfigError

MIB, GIB = 2**20, 2**30


def model(layers=8, *, tied=False, layer=GIB, embedding=GIB, head=GIB, head_time=1.0, kept=100_000, **more):
    """A model of equal layers; nothing passes unless ``more`` says so."""
    return ModelParts(
        embedding=PartSizes(embedding, 0, 0.0),
        layers=(PartSizes(layer, 0, 1.0),) * layers,
        head=PartSizes(head, 0, head_time),
        tied=tied,
        kept_per_token=kept,
        kept_when_recomputing=kept // 10,
        layer_passing=more.pop("layer_passing", lambda tokens: 0),
        head_passing=more.pop("head_passing", lambda tokens: 0),
        **more,
    )


def random_model(rng, layers):
    def part(time):
        return PartSizes(rng.randrange(1, 900) * MIB, rng.randrange(300) * MIB, time)

    return ModelParts(
        embedding=part(0.0),
        layers=tuple(part(rng.choice([0.5, 1.0, 1.0, 1.0, 2.0])) for _ in range(layers)),
        head=part(rng.choice([0.0, 1.0, 4.0])),
        tied=rng.random() < 0.5,
        kept_per_token=rng.randrange(50, 400) * 1000,
        kept_when_recomputing=rng.randrange(1, 50) * 1000,
        layer_passing=lambda tokens: 40_000 * tokens,
        head_passing=lambda tokens: 200 * MIB + 20_000 * tokens,
    )


def stage_of(parts, start, stop, later, limit, tokens, micro_batches, *, may_recompute=True):
    """(time, bytes) of a stage, or None; layers begin to recompute one by one until it fits."""
    last = stop == len(parts.layers)
    held = list(parts.layers[start:stop]) + [parts.head] * last
    held += [parts.embedding] * (last if parts.tied else start == 0)
    fixed = int(0.6 * GIB) + sum(part.weights + part.trained for part in held)
    passing = max(parts.layer_passing(tokens), parts.head_passing(tokens) if last else 0)
    flying = tokens * min(later + 1, micro_batches)
    average = sum(layer.time for layer in parts.layers) / len(parts.layers)
    for recomputing in range(stop - start + 1 if may_recompute else 1):
        kept = recomputing * parts.kept_when_recomputing
        kept += (stop - start - recomputing) * parts.kept_per_token
        activations = passing + flying * kept
        need = fixed + activations + activations // 10
        if need <= limit:
            return sum(part.time for part in held) + RECOMPUTE_TIME * average * recomputing, need
    return None


def all_splits(parts, limits, tokens, micro_batches):
    """Every split that keeps the limits: (number of stages, slowest time, fullest GPU)."""
    count = len(parts.layers)
    for stages in range(1, min(len(limits), count) + 1):
        for gpus in itertools.combinations(limits, stages):
            for cuts in itertools.combinations(range(1, count), stages - 1):
                edges = [0, *cuts, count]
                found = [
                    stage_of(parts, *edges[i : i + 2], stages - 1 - i, limits[gpu], tokens, micro_batches)
                    for i, gpu in enumerate(gpus)
                ]
                if all(found):
                    yield stages, max(one[0] for one in found), max(one[1] for one in found)


def stages_of(placement):
    """(GPU, first layer, one after the last) of each stage."""
    edges = [
        (gpu, [i for i, one in enumerate(placement.layers) if one == gpu])
        for gpu in dict.fromkeys(placement.layers)
    ]
    return [(gpu, mine[0], mine[-1] + 1) for gpu, mine in edges]


def counted(placement, parts, limits, tokens, micro_batches):
    """(slowest time, bytes of each GPU) of a placement, by this file's own counting."""
    stages = stages_of(placement)
    found = {
        gpu: stage_of(parts, start, stop, len(stages) - 1 - i, limits[gpu], tokens, micro_batches)
        for i, (gpu, start, stop) in enumerate(stages)
    }
    assert all(found.values()), "a limit is broken"
    return max(time for time, _ in found.values()), {gpu: need for gpu, (_, need) in found.items()}


def random_case(seed):
    rng = random.Random(seed)
    parts = random_model(rng, rng.randrange(1, 9))
    total = sum(part.weights + part.trained for part in (parts.embedding, *parts.layers, parts.head))
    gpus = rng.randrange(1, 5)
    limits = {
        index: int(CONTEXT_BYTES + total / gpus * rng.uniform(0.4, 3.0))
        for index in rng.sample(range(8), gpus)
    }
    return parts, limits, rng.randrange(1, 3000), rng.randrange(1, 6)


@pytest.mark.parametrize("seed", range(300))
def test_balanced_is_the_best_of_all_splits(seed):
    parts, limits, tokens, micro_batches = random_case(seed)
    splits = list(all_splits(parts, limits, tokens, micro_batches))
    if not splits:
        with pytest.raises(ConfigError, match="does not fit"):
            place("balanced", parts, limits, tokens=tokens, micro_batches=micro_batches)
        return
    most = max(stages for stages, _, _ in splits)
    slowest = min(time for stages, time, _ in splits if stages == most)
    fullest = min(need for stages, time, need in splits if stages == most and time <= slowest * (1 + 1e-9))
    placement = place("balanced", parts, limits, tokens=tokens, micro_batches=micro_batches)
    time, needs = counted(placement, parts, limits, tokens, micro_batches)
    assert len(needs) == most, "a GPU is empty without need"
    assert time == pytest.approx(slowest) and max(needs.values()) == fullest
    assert placement.predicted == needs
    assert all(need <= limits[gpu] for gpu, need in placement.predicted.items())


def test_the_random_cases_are_of_every_kind():
    """Limits that bind, that bind so much that GPUs stay empty, that cannot be kept, and that do not matter."""
    kinds = {"fits": 0, "empty": 0, "impossible": 0, "recomputes": 0}
    for seed in range(300):
        parts, limits, tokens, micro_batches = random_case(seed)
        try:
            placement = place("balanced", parts, limits, tokens=tokens, micro_batches=micro_batches)
        except ConfigError:
            kinds["impossible"] += 1
            continue
        kinds["fits"] += 1
        kinds["empty"] += len(placement.predicted) < min(len(limits), len(parts.layers))
        kinds["recomputes"] += any(placement.recomputing.values())
    assert all(count >= 10 for count in kinds.values()), kinds


@pytest.mark.parametrize("seed", range(300))
def test_sequential_fills_in_order(seed):
    parts, limits, tokens, micro_batches = random_case(seed)
    if not any(all_splits(parts, limits, tokens, micro_batches)):
        with pytest.raises(ConfigError, match="does not fit"):
            place("sequential", parts, limits, tokens=tokens, micro_batches=micro_batches)
        return
    placement = place("sequential", parts, limits, tokens=tokens, micro_batches=micro_batches)
    _, needs = counted(placement, parts, limits, tokens, micro_batches)
    assert placement.predicted == needs
    order = list(limits)
    stages = stages_of(placement)
    positions = [order.index(gpu) for gpu, _, _ in stages]
    assert positions == sorted(positions)
    # Recompute comes after the last GPU; and with the fewest GPUs that do, no stage could be longer.
    level = any(placement.recomputing.values())
    splits = Splits(parts, limits, tokens, micro_batches, may_recompute=level)
    used = order[: positions[-1] + 1]
    for fewer in range(1, len(used)):
        assert not any(splits.are_there(0, count, order[:fewer]) for count in range(1, fewer + 1))
    assert not any(splits.are_there(0, count, used) for count in range(len(stages) + 1, len(used) + 1))
    for number, (gpu, start, stop) in enumerate(stages[:-1]):
        later = len(stages) - 1 - number
        behind = used[used.index(gpu) + 1 :]
        for more in range(stop + 1, len(parts.layers) - later + 1):
            assert not (splits.stage(start, more, later, gpu) and splits.are_there(more, later, behind))
    if level:
        plain = Splits(parts, limits, tokens, micro_batches, may_recompute=False)
        assert not any(plain.are_there(0, count, limits) for count in range(1, len(limits) + 1))


class Splits:
    """Which splits keep the limits, one by one."""

    def __init__(self, parts, limits, tokens, micro_batches, *, may_recompute):
        self.count = len(parts.layers)
        self.stage = lambda start, stop, later, gpu: stage_of(
            parts, start, stop, later, limits[gpu], tokens, micro_batches, may_recompute=may_recompute
        )

    def are_there(self, start, stages, gpus):
        """Whether the layers from ``start`` on fit into so many stages on these GPUs."""
        return any(
            all(
                self.stage(*edges, stages - 1 - i, gpu)
                for i, (gpu, edges) in enumerate(zip(chosen, pairs, strict=True))
            )
            for chosen in itertools.combinations(gpus, stages)
            for cuts in itertools.combinations(range(start + 1, self.count), stages - 1)
            for pairs in [list(itertools.pairwise([start, *cuts, self.count]))]
        )


def test_sequential_leaves_the_last_gpus_alone():
    placement = place("sequential", model(), dict.fromkeys(range(4), 7 * GIB), tokens=1, micro_batches=8)
    assert placement.layers == (0,) * 5 + (1,) * 3, "5 layers and the embedding, 3 and the head"
    assert set(placement.predicted) == {0, 1}


def test_sequential_rather_uses_one_more_gpu_than_recomputes():
    parts = model(kept=2**20)  # 1 GiB a layer for 1,024 tokens
    limits = dict.fromkeys(range(4), int(9.9 * GIB))
    placement = place("sequential", parts, limits, tokens=1024, micro_batches=1)
    assert placement.layers == (0,) * 3 + (1,) * 4 + (2,)
    assert not any(placement.recomputing.values())
    two = {0: limits[0], 1: limits[1]}
    assert place("sequential", parts, two, tokens=1024, micro_batches=1).recomputing[0] > 0


def test_auto_takes_one_gpu_if_that_holds_the_model():
    parts = model(layers=8)  # 10 GiB
    assert place("auto", parts, {0: 11 * GIB, 1: 40 * GIB, 2: 40 * GIB}, tokens=1, micro_batches=8).gpus == (
        1,
    )
    split = place("auto", parts, {0: 9 * GIB, 1: 9 * GIB}, tokens=1, micro_batches=8)
    assert split == place("balanced", parts, {0: 9 * GIB, 1: 9 * GIB}, tokens=1, micro_batches=8)
    assert split.layers == (0,) * 4 + (1,) * 4


def test_a_model_that_fits_with_recompute_alone_stays_on_one_gpu():
    parts = model(kept=2**20)
    assert fits(parts, 20 * GIB, 1024) and place(
        "auto", parts, {0: 20 * GIB, 1: 20 * GIB}, tokens=1024, micro_batches=8
    ).recomputing == {0: 0}
    placement = place("auto", parts, {0: 14 * GIB, 1: 14 * GIB}, tokens=1024, micro_batches=8)
    assert placement.gpus == (0,) and 0 < placement.recomputing[0] < 8
    assert fits(parts, placement.predicted[0], 1024) and not fits(parts, 10 * GIB, 1024)


@pytest.mark.promise("A6")
def test_the_exact_limit_is_kept_and_one_byte_less_is_not():
    parts = model(1, kept=1000)
    activations = 300 * 100  # recomputing, 300 tokens
    need = CONTEXT_BYTES + 3 * GIB + activations + activations // 10
    assert fits(parts, need, 300) and not fits(parts, need - 1, 300)


def test_a_slow_head_gets_fewer_layers_beside_it():
    placement = place(
        "balanced", model(12, head_time=4.0), dict.fromkeys(range(4), 80 * GIB), tokens=1, micro_batches=8
    )
    times = [placement.layers.count(gpu) + 4 * (gpu == 3) for gpu in range(4)]
    assert max(times) == 5 and placement.head == 3 and placement.layers.count(3) == 1


def test_a_tied_embedding_is_with_the_head():
    limits = {0: 80 * GIB, 1: 80 * GIB}
    tied = place("balanced", model(tied=True, head=MIB, head_time=0), limits, tokens=1, micro_batches=8)
    assert (tied.embedding, tied.layers[0], tied.head) == (1, 0, 1)
    untied = place("balanced", model(head_time=0), limits, tokens=1, micro_batches=8)
    assert (untied.embedding, untied.layers[0], untied.head) == (0, 0, 1)
    assert tied.predicted[0] + GIB == untied.predicted[0]


@pytest.mark.parametrize(
    ("micro_batches", "flying"), [(1, [1, 1, 1, 1]), (3, [3, 3, 2, 1]), (16, [4, 3, 2, 1])]
)
def test_early_stages_hold_more_micro_batches(micro_batches, flying):
    parts = model(4, layer=0, embedding=0, head=0, kept=1000)
    placement = place(
        "balanced", parts, dict.fromkeys(range(4), GIB), tokens=1000, micro_batches=micro_batches
    )
    assert [placement.predicted[gpu] - CONTEXT_BYTES for gpu in range(4)] == [
        1_100_000 * count for count in flying
    ]


def test_gpus_are_used_in_the_order_given():
    placement = place("balanced", model(4), {3: 80 * GIB, 1: 80 * GIB}, tokens=1, micro_batches=8)
    assert placement.gpus == (3, 1) and placement.layers == (3, 3, 1, 1)


def test_a_gpu_without_room_stays_empty():
    limits = {0: 80 * GIB, 1: GIB, 2: 80 * GIB}
    placement = place("balanced", model(4), limits, tokens=1, micro_batches=8)
    assert placement.layers == (0, 0, 2, 2)
    few = place("balanced", model(2), dict.fromkeys(range(4), 80 * GIB), tokens=1, micro_batches=8)
    assert few.layers == (0, 1)


def test_large_models_are_placed_at_once():
    rng = random.Random(0)
    layers = tuple(PartSizes(GIB + rng.randrange(MIB), MIB, rng.uniform(0.9, 1.1)) for _ in range(126))
    parts = model(head_time=1.3, kept=300_000)
    parts = ModelParts(**{**vars(parts), "layers": layers})
    for limit, works in ((80, True), (23, True), (18, False)):
        for kind in ("balanced", "sequential"):
            start = time.process_time()
            try:
                place(kind, parts, dict.fromkeys(range(8), int(limit * GIB)), tokens=2048, micro_batches=16)
                assert works
            except ConfigError:
                assert not works
            # 0.06 s; several times that where lines are counted.
            assert time.process_time() - start < 1, (kind, limit)


def test_planning_loads_no_torch():
    program = (
        "import sys\n"
        "import pantheraml.devices.device_map, pantheraml.devices.map_names, pantheraml.devices.memory_limits\n"
        "import pantheraml.devices.visible_gpus\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


def test_the_table_says_what_is_where():
    limits = {0: 9 * GIB, 1: 9 * GIB}
    placement = place("balanced", model(kept=2**20), limits, tokens=1024, micro_batches=8)
    assert describe(placement, model()).splitlines() == [
        "GPU  layers  weights  peak  limit",
        "  0     0-3      5.0   8.5    9.0  embedding, 3 recompute",
        "  1     4-7      5.0   8.0    9.0  head, 2 recompute",
    ]


def test_two_rounds_where_limits_allow():
    parts, step = model(layers=9, kept=100_000), dict(tokens=1024, micro_batches=8)
    placement = place("balanced", parts, dict.fromkeys(range(2), 9 * GIB), **step)
    assert placement.layers == (0,) * 5 + (1,) * 4
    turns = interleaved(placement, parts, **step)
    assert turns is not None and turns.layers == (0,) * 3 + (1,) * 2 + (0,) * 2 + (1,) * 2
    # GPU 0 holds 5 graphs of two rounds: 2.5 micro-batches instead of 2, a quarter more of activations.
    kept = 5 * 1024 * 100_000
    assert turns.predicted[0] - placement.predicted[0] == pytest.approx(1.1 * kept / 2, rel=1e-3)
    assert describe(turns, parts).splitlines()[1].split()[:4] == ["0", "0-2,", "5-6", "6.0"]
    tight = {gpu: need + 1 for gpu, need in placement.predicted.items()}
    assert interleaved(place("balanced", parts, tight, **step), parts, **step) is None


@pytest.mark.parametrize("layers", [2, 3])
def test_a_gpu_with_one_layer_has_one_round(layers):
    parts, step = model(layers=layers), dict(tokens=1, micro_batches=8)
    placement = place("balanced", parts, dict.fromkeys(range(2), 99 * GIB), **step)
    assert interleaved(placement, parts, **step) is None


def test_rounds_that_would_be_slower_are_left():
    """The slow layers are the first ones, which in two rounds would come to be with fast ones on other GPUs."""
    parts = model(layers=8)
    slow = [
        replace(layer, time=4.0) if index in (2, 3) else layer for index, layer in enumerate(parts.layers)
    ]
    parts, step = replace(parts, layers=tuple(slow)), dict(tokens=1, micro_batches=8)
    placement = place("balanced", parts, dict.fromkeys(range(2), 99 * GIB), **step)
    assert placement.layers == (0,) * 3 + (1,) * 5
    assert interleaved(placement, parts, **step) is None
