"""The training and evaluation rows that a run's settings name."""

from __future__ import annotations

import sys
from collections.abc import Sized
from hashlib import sha256
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from pantheraml.config.run import DataSettings, RunConfig

    Rows = Dataset | IterableDataset

# Splits of a loader's DatasetDict that are evaluated on when data.eval_split names none.
_EVAL_SPLITS = ("validation", "eval", "test")


def read_rows(config: RunConfig) -> tuple[Rows, Rows | None]:
    """Read the rows of ``data.path`` or of the debug data set; needs no model.

    Returns:
        Training rows, and evaluation rows or None.

    Raises:
        DataError: when rows cannot be read.
    """
    data = config.data
    train = _load_split(config, data.split)
    evaluation = _load_split(config, data.eval_split) if data.eval_split and not data.eval_path else None
    return _cut(config, train, evaluation)


def call_loader(
    loader: Any, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, Rows | None]:
    """Let a function of the user make the rows.

    Args:
        loader: what :func:`find_loader` found for ``data.loader``.
        config: the run; the function is called with its ``data`` section.
        tokenizer: the run's tokenizer, the function's second argument.

    Returns:
        Training rows, and evaluation rows or None.

    Raises:
        DataError: when it returns no data set, lacks a split, or returned other rows on another rank.
    """
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    data = config.data
    rows = loader(data, tokenizer)
    evaluation = None
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        wanted = data.eval_split or next((name for name in _EVAL_SPLITS if name in rows), None)
        if wanted is not None and data.eval_path is None and data.validation_fraction is None:
            evaluation = _pick(rows, wanted, data)
        rows = _pick(rows, data.split, data)
    elif data.eval_split is not None and data.eval_path is None:
        raise DataError(
            f"data.eval_split is {data.eval_split!r}, but {data.loader} returned a data set without splits.",
            "A split can be chosen from a DatasetDict.",
            "Return a DatasetDict, or use data.validation_fraction.",
        )
    if not isinstance(rows, Dataset | IterableDataset):
        raise DataError(
            f"{data.loader} returned {type(rows).__name__}.",
            "It has to return a datasets.Dataset, or a DatasetDict with a training split.",
            "Wrap a list of rows with datasets.Dataset.from_list(rows).",
        )
    _check_same_rows(str(data.loader), rows, evaluation)
    return _cut(config, rows, evaluation)


def find_loader(name: str) -> Any:
    """The function that ``package.module:function`` names; the current folder is searched too.

    Raises:
        DataError: when the module cannot be found, has no such function, or one with other arguments.
    """
    module_name, _, function_name = name.partition(":")
    # The pantheraml command starts with its own folder on the path, not the user's.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own module needs
        raise DataError(
            f"data.loader is {name}, but there is no module {error.name}.",
            "It is searched for in the current folder and among installed packages.",
            f"Start from the folder that has {module_name.split('.')[0]}.",
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(
            f"data.loader is {name}, but {module_name} has no function {function_name}.",
            "It is called with (data settings, tokenizer) and returns a Dataset or a DatasetDict.",
            did_you_mean(function_name, vars(module)),
        )
    _check_arguments(name, function)
    return function


def _check_arguments(name: str, function: Any) -> None:
    """Refuse a loader that cannot be called as it will be, before a model is loaded for it."""
    try:
        arguments = signature(function)
    except ValueError:  # some that are written in C do not tell
        return
    try:
        arguments.bind("data settings", "tokenizer")
    except TypeError:
        raise DataError(
            f"data.loader is {name}, which takes {arguments}.",
            "It is called with (data settings, tokenizer) and returns a Dataset or a DatasetDict.",
            f"Write def {name.partition(':')[2]}(config, tokenizer).",
        ) from None


def _check_same_rows(loader: str, *parts: Rows | None) -> None:
    """Refuse rows that are not the same on all ranks, of which some would be seen twice and others never.

    Compared are their number and three of each part; rows of a stream are not known before they are read.

    Raises:
        DataError: another rank has other rows; raised on all of them.
    """
    from datasets import Dataset

    from pantheraml.distributed.process_group import gather_objects

    mine = [
        (len(rows), repr([rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1}) if len(rows)]))
        for rows in parts
        if isinstance(rows, Dataset)
    ]
    by_rank = gather_objects(sha256(repr(mine).encode()).hexdigest())
    others = [rank for rank, digest in enumerate(by_rank) if digest != by_rank[0]]
    if others:
        raise DataError(
            f"{loader} returned other rows on rank {others[0]} than on rank 0.",
            "Each rank calls it and takes its share of the rows, so that all must have the same, in one order.",
            "Give every shuffle and sample a seed, and read the same files on every machine.",
        )


def _load_split(config: RunConfig, split: str) -> Rows:
    from pantheraml.data.debug_dataset import load_debug_dataset
    from pantheraml.data.sources import load_rows

    data = config.data
    if data.use_debug_dataset:
        return load_debug_dataset(split)
    return load_rows(data.path or "", split=split, name=data.name, token=config.model.token)


def _pick(splits: Any, name: str, data: DataSettings) -> Any:
    if name not in splits:
        raise DataError(
            f"{data.loader} returned no split {name!r}.",
            f"It returned {', '.join(map(repr, splits))}.",
            "Set data.split and data.eval_split to these.",
        )
    return splits[name]


def _cut(config: RunConfig, train: Rows, evaluation: Rows | None) -> tuple[Rows, Rows | None]:
    """Apply ``max_rows``, ``eval_path`` and ``validation_fraction``."""
    from pantheraml.data.sources import load_rows, split_rows

    data = config.data
    if data.max_rows is not None:
        # A stream has no length; older versions of datasets refuse to take more rows than there are.
        train = train.take(min(data.max_rows, len(train)) if isinstance(train, Sized) else data.max_rows)
    if data.eval_path is not None:
        evaluation = load_rows(data.eval_path, split=data.eval_split or "train", token=config.model.token)
    if data.validation_fraction is not None:
        train, evaluation = split_rows(train, data.validation_fraction, config.seed)
    if evaluation is None and config.trainer.eval_strategy in ("steps", "epoch"):
        raise DataError(
            f"trainer.eval_strategy is {config.trainer.eval_strategy}, but there are no evaluation rows.",
            f"{data.loader} can return a DatasetDict with a validation split.",
            "Or set data.eval_path or data.validation_fraction.",
        )
    return train, evaluation
