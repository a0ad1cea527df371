"""``MultiGPUTrainer`` on gloo ranks: the training of a plain loop, for any module, loader and aggregation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pantheraml import AggregationMethod, MultiGPUConfig, MultiGPUTrainer, get_rank, setup_multi_gpu
from pantheraml.distributed.process_group import is_distributed_available
from pantheraml.errors import ConfigError, DataError, PantheraMLError
from pantheraml.launch import start
from pantheraml.launch.process import Process
from pantheraml.training.batch_parts import rows_of_rank
from pantheraml.training.direct import check_absence
from tests import tiny
from tests.distributed.ranks import run_ranks

SGD = {"class": torch.optim.SGD, "kwargs": {"lr": 0.1, "momentum": 0.9}}
MEAN, SUM, WEIGHTED = AggregationMethod
# 21 images in batches of 5: parts of 3 and 2 rows, and one of a single row that one rank alone has.
IMAGES = TensorDataset(
    torch.randn(21, 1, 6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(21) % 4
)


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


def without_statistics():
    model = cnn()
    model[1] = nn.Identity()
    return model


def loader(**more):
    return DataLoader(IMAGES, batch_size=5, shuffle=True, **more)


def weights_of(model):
    return [p.detach().clone().numpy() for p in model.parameters()]


def direct(method, loss_function, epochs=2, **more):
    model = without_statistics()
    trainer = MultiGPUTrainer(model, None, SGD, method, loss_function=loss_function, **more)
    trainer.setup()
    torch.manual_seed(7 + get_rank())  # ranks that draw by themselves would have rows of their own
    stats = [trainer.train_epoch(loader()) for _ in range(epochs)]
    return weights_of(model), [(one["epoch"], one["steps"], one["rows"], one["loss"]) for one in stats]


def plain(loss_of_batch, epochs=2):
    """The loop that everybody writes for one process."""
    model = without_statistics()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(7)
    means = []
    for _ in range(epochs):
        losses = []
        for images, labels in loader():
            optimizer.zero_grad()
            loss = loss_of_batch(model, images, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return weights_of(model), means


def mean_of_parts(model, images, labels):
    parts = [rows_of_rank(len(labels), rank, 2) for rank in range(2)]
    losses = [
        nn.functional.cross_entropy(model(images[part]), labels[part]) for part in parts if len(labels[part])
    ]
    return sum(losses) / len(losses)


def whole(reduction):
    return lambda model, images, labels: nn.functional.cross_entropy(
        model(images), labels, reduction=reduction
    )


@pytest.mark.promise("C3")
@pytest.mark.parametrize(
    ("method", "reduction", "reference"),
    [(MEAN, "mean", mean_of_parts), (SUM, "sum", whole("sum")), (WEIGHTED, "mean", whole("mean"))],
    ids=lambda value: str(value) if isinstance(value, AggregationMethod) else "",
)
def test_two_ranks_train_as_one_process(method, reduction, reference):
    loss = nn.CrossEntropyLoss(reduction=reduction)
    if method is SUM:
        loss = lambda output, labels: nn.functional.cross_entropy(output, labels, reduction="sum") / 4  # noqa: E731
        reference = lambda *batch: whole("sum")(*batch) / 4  # noqa: E731
    want, means = plain(reference)
    for found, stats in run_ranks(2, direct, method, loss):
        for mine, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-6, atol=1e-6)
        assert [one[:3] for one in stats] == [(1, 5, 21), (2, 5, 21)]
        assert [one[3] for one in stats] == pytest.approx(means, rel=1e-6)


def test_one_process_is_the_plain_loop():
    want, means = plain(whole("mean"))
    found, stats = direct(MEAN, nn.CrossEntropyLoss())
    assert all((mine == theirs).all() for mine, theirs in zip(found, want, strict=True))
    assert [one[3] for one in stats] == pytest.approx(means, rel=1e-6)


class Stream(IterableDataset):
    """Rows of a generator, with nothing to draw indices from."""

    def __init__(self, rows=11, first=0):
        self.rows, self.first = rows, first

    def __iter__(self):
        return iter(range(self.first, self.first + self.rows))


class Seen(nn.Module):
    """Remembers the rows that it was given; its loss is that of a mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.rows = []

    def forward(self, rows, names=(), scale=1):
        assert len(names) in (0, len(rows))
        self.rows += rows.tolist()
        return {"loss": (self.weight * rows).mean() * scale, "beside": None}


def epoch_over(batches):
    model = Seen()
    stats = MultiGPUTrainer(model, None, SGD, WEIGHTED).train_epoch(batches)
    return model.rows, stats["rows"], model.weight.item()


def rows_of_loaders():
    """Of each kind of loader: what this rank has seen, and the weight that it trained."""
    mappings = [
        {"rows": torch.arange(n) + 10.0 * n, "names": list("abcde"[:n]), "scale": torch.tensor(2)}
        for n in (5, 1, 4)
    ]
    with_workers = DataLoader(torch.arange(11), batch_size=4, num_workers=1, shuffle=True)
    kinds = [
        DataLoader(torch.arange(11), batch_size=4, shuffle=True),
        with_workers,
        DataLoader(Stream(), batch_size=4),
        DataLoader(torch.arange(8).reshape(4, 2), batch_size=None),
        mappings,
        [(torch.arange(3.0), ["a", "b", "c"], 1)],
        (torch.arange(n) for n in (2, 3)),
    ]
    return [epoch_over(kind) for kind in kinds]


@pytest.mark.promise("C3")
def test_every_row_of_any_loader_is_on_one_rank():
    alone = rows_of_loaders()
    for number, ((rows, count, weight), first, second) in enumerate(
        zip(alone, *run_ranks(2, rows_of_loaders), strict=True)
    ):
        assert sorted(first[0] + second[0]) == sorted(rows), number
        assert abs(len(first[0]) - len(second[0])) <= number + 3 and first[0] and second[0]
        assert first[1] == second[1] == count == len(rows) and first[2] == second[2]
        if number > 1:  # the others are shuffled, and each run by itself
            assert first[2] == pytest.approx(weight, rel=1e-6)


def sentences():
    """Ragged rows of tokens with masked beginnings; of the last batch one rank has no label."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number, length in enumerate((3, 12, 7, 25, 4, 9, 16, 5)):
        ids = torch.randint(5, 400, (length,), generator=generator).tolist()
        masked = length if length == 5 else number % 3
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    return {
        **batch,
        "attention_mask": torch.tensor(
            [[n < len(r["input_ids"]) for n in range(longest)] for r in rows]
        ).long(),
    }


def language(method):
    model = tiny.build_model("llama")
    with MultiGPUTrainer(model, None, SGD, method) as trainer:
        loss = trainer.train_epoch(DataLoader(sentences(), batch_size=3, collate_fn=padded))["loss"]
    assert trainer.optimizer is None
    return loss, weights_of(model)


@pytest.mark.promise("C3")
def test_tokens_weigh_what_they_weigh_in_one_process():
    want_loss, want = language(WEIGHTED)
    for loss, found in run_ranks(2, language, WEIGHTED):
        assert loss == pytest.approx(want_loss, rel=1e-6)
        for mine, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-6, atol=1e-6)
    assert run_ranks(2, language, MEAN)[0][0] != pytest.approx(want_loss, rel=1e-4)


def with_statistics():
    """Buffers are the same on all ranks after an epoch; a module that skips a part needs to say so."""
    model = cnn()
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    config = MultiGPUConfig(find_unused_parameters=True, reduce_dtype="bfloat16")
    trainer = MultiGPUTrainer(
        model, None, SGD, "weighted", loss_function=nn.CrossEntropyLoss(), weigh_by=lambda batch: len(batch[1]) ** 2,
        multi_gpu_config=config,
    )  # fmt: skip
    trainer.train_epoch(loader())
    return [buffer.tolist() for buffer in model.buffers()], weights_of(model), model.unused.grad


def leaves_one_out():
    """What is said of a part that is skipped where nobody said so; the others have not moved."""
    model = cnn()
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    before = weights_of(model)
    trainer = MultiGPUTrainer(model, None, SGD, loss_function=nn.CrossEntropyLoss())
    with pytest.raises(ConfigError) as said:
        trainer.train_epoch(loader())
    return str(said.value), all(
        (mine == old).all() for mine, old in zip(weights_of(model), before, strict=True)
    )


def test_a_weight_without_a_part_is_named_before_others_move():
    for said, stayed in run_ranks(2, leaves_one_out):
        assert "no gradient to trained weights: unused." in said and stayed


def test_statistics_and_weights_are_those_of_all_ranks():
    (statistics, weights, grad), (same, theirs, _) = run_ranks(2, with_statistics)
    assert statistics == same and statistics[0] != [0.0, 0.0, 0.0] and grad is None
    assert all((mine == their).all() for mine, their in zip(weights, theirs, strict=True))


class Bad(Dataset):
    """A row that cannot be read."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 7:
            raise OSError("row 7 is gone")
        return torch.tensor(float(index))


def fails_on(rank, output, labels):
    if get_rank() == rank:
        raise FloatingPointError("only here")
    return (output - labels).sum()


def failures():
    """What each rank says of an epoch that fails on one of them, and that it goes on then."""
    said = []
    trainer = MultiGPUTrainer(
        nn.Linear(4, 4), None, SGD, loss_function=lambda *both: fails_on(failing, *both)
    )
    trainer.setup()
    images = [(torch.ones(4, 4), torch.ones(4, 4))]
    for failing in (0, 1):
        said.append(refused(trainer.train_epoch, images))
    failing = None
    assert trainer.train_epoch(images)["steps"] == 1
    seen = MultiGPUTrainer(Seen(), None, SGD)
    for batches in (
        DataLoader(Bad(), batch_size=4),
        DataLoader(Stream(first=get_rank()), batch_size=4),
        [torch.ones(4)] * (2 + get_rank()),
        DataLoader(Bad(), sampler=DistributedSampler(Bad())),
        DataLoader(Bad(), sampler=(1 / (3 - n) for n in range(9))),
        [{"a": torch.ones(4), "b": torch.ones(3)}],
        ["a text"],
    ):
        said.append(refused(seen.train_epoch, batches))
    assert seen.train_epoch([torch.ones(4)])["steps"] == 1
    return said


def refused(function, *arguments):
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return type(caught.value), f"{caught.value} {''.join(getattr(caught.value, '__notes__', []))}"


def test_what_fails_on_one_rank_fails_on_all():
    first, second = run_ranks(2, failures)
    expected = [
        (
            (FloatingPointError, "only here"),
            (PantheraMLError, "Rank 0 failed: FloatingPointError: only here"),
        ),
        ((PantheraMLError, "in fails_on"), (FloatingPointError, "only here")),
        ((PantheraMLError, "Rank 1 failed: OSError: row 7 is gone"), (OSError, "row 7 is gone")),
        ((DataError, "read batches that differ"),) * 2,
        ((DataError, "or not as many of them"),) * 2,
        ((DataError, "DistributedSampler"),) * 2,
        ((ZeroDivisionError, ""), (DataError, "The sampler failed on the first rank")),
        ((DataError, "tensors of 4 and of 3 rows"),) * 2,
        ((DataError, "without a tensor that has rows"),) * 2,
    ]
    for said, wanted in zip(zip(first, second, strict=True), expected, strict=True):
        for (kind, text), (want_kind, want_text) in zip(said, wanted, strict=True):
            assert kind is want_kind and want_text in text, (said, wanted)


def test_a_rank_without_rows_where_ranks_talk_in_the_forward():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(cnn())  # which runs on GPUs alone
    check_absence(module, everyone=True)
    with pytest.raises(DataError, match="SyncBatchNorm"):
        check_absence(module, everyone=False)


def group_of_its_own():
    setup_multi_gpu(MultiGPUConfig())
    trainer = MultiGPUTrainer(nn.Linear(2, 2), None, SGD)
    trainer.setup()
    trainer.cleanup()
    return is_distributed_available()


def test_cleaning_up_leaves_a_group_that_was_there():
    assert run_ranks(2, group_of_its_own) == [True, True]


def frozen():
    model = nn.Linear(2, 2)
    model.requires_grad_(False)
    return MultiGPUTrainer(model, 1, SGD).setup()


REFUSED = {
    "an optimizer_config that is missing": lambda: MultiGPUTrainer(nn.Linear(2, 2), 1),
    "Its keys are 'class' and 'kwargs'. Did you mean 'kwargs'": lambda: MultiGPUTrainer(
        nn.Linear(2, 2), 1, {"class": torch.optim.SGD, "kwarg": {}}
    ),
    "AggregationMethod.MEAN, SUM or WEIGHTED": lambda: MultiGPUTrainer(nn.Linear(2, 2), 1, SGD, "max"),
    "Only AggregationMethod.WEIGHTED weighs": lambda: MultiGPUTrainer(nn.Linear(2, 2), 1, SGD, weigh_by="rows"),
    'It is "rows", "tokens"': lambda: MultiGPUTrainer(nn.Linear(2, 2), 1, SGD, WEIGHTED, weigh_by="labels"),
    "no parameter that is trained": frozen,
    "two names of the number of ranks": lambda: MultiGPUTrainer(
        nn.Linear(2, 2), 1, SGD, multi_gpu_config=MultiGPUConfig(num_processes=2)
    ),
    "a whole copy of the module on each GPU": lambda: MultiGPUTrainer(
        nn.Linear(2, 2), 1, SGD, multi_gpu_config=MultiGPUConfig(strategy="fsdp")
    ),
    "batches have no \"labels\"": lambda: MultiGPUTrainer(
        Seen(), 1, SGD, WEIGHTED, weigh_by="tokens"
    ).train_epoch([torch.ones(2)]),
    "a tensor of shape (2, 2)": lambda: MultiGPUTrainer(nn.Linear(2, 2), 1, SGD).train_epoch([torch.ones(2, 2)]),
    'what is called "labels"': lambda: MultiGPUTrainer(
        Seen(), 1, SGD, loss_function=nn.MSELoss()
    ).train_epoch([{"rows": torch.ones(2)}]),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_is_said(said):
    with pytest.raises(ConfigError) as caught:
        REFUSED[said]()
    assert said.removeprefix("an optimizer_config that is missing") in str(caught.value)


def test_weights_are_let_go_of_before_ranks_start(monkeypatch):
    """A plain script's process waits for its ranks, and has loaded the model that they load, too."""
    model, left = cnn(), []

    def agent(_):
        left.append(sum(tensor.nbytes for tensor in model.state_dict().values()))
        raise SystemExit

    monkeypatch.setattr(start, "become_agent", agent)
    monkeypatch.setattr(Process, "read", classmethod(lambda cls: cls()))
    with pytest.raises(SystemExit):
        MultiGPUTrainer(model, 2, SGD).setup()
    assert left == [0]
