"""Rows from a path or a hub id, as a ``datasets`` object.

Reading is done by ``datasets``; this module decides which of its loaders fits, and turns what goes
wrong into one sentence about the user's file. Code that lies beside a data set is never run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_SUPPORTED = ", ".join(_BUILDERS)
# How datasets names the splits there are, after one that it does not find.
_KNOWN_SPLITS = re.compile(r"(?:Unknown split|Bad split|Available splits).*(\['[^\[\]]*'\])\.?$")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    name: str | None = None,
    token: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load the rows of one split.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet or text, also gzipped), a folder of such files, a
            folder written by ``save_to_disk``, or the id of a data set on the hub (``owner/name``). What
            exists on disk wins over a hub id of the same name.
        split: name of the split; slices such as ``train[:10%]`` are understood unless streaming.
        name: configuration of a hub data set that has several.
        token: hub token for private and gated data sets.
        streaming: read rows as they are needed instead of preparing all of them first.

    Raises:
        DataError: nothing is there, it cannot be read, it has no rows, or it has no such split.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _load_file(path, split, streaming)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        rows = _load_saved(path, split, streaming)
    elif path.is_dir():
        rows = _load_folder(path, split, name, streaming)
    else:
        rows = _load_hub(str(source), split, name, token, streaming)
    _refuse_empty(rows, source, split)
    return rows


def split_rows(
    dataset: Dataset | IterableDataset, validation: float | int, seed: int = 3407
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Set rows aside for validation.

    Args:
        dataset: the rows.
        validation: a fraction below 1.0 of the rows, or a number of rows.
        seed: which rows are drawn. Streams are not shuffled: their first rows are set aside.

    Returns:
        The rows to train on and the rows to validate with.
    """
    from datasets import Dataset

    if isinstance(validation, bool) or validation <= 0 or (isinstance(validation, float) and validation >= 1):
        raise ConfigError(
            got=f"The part to set aside for validation is {validation!r}.",
            need="It must be a fraction between 0 and 1, or a whole number of rows.",
            fix="Write for example 0.05 (five percent) or 200 (rows).",
        )
    if not isinstance(dataset, Dataset):
        if isinstance(validation, float):
            raise ConfigError(
                got=f"A fraction ({validation}) of a streamed data set is asked for validation.",
                need="A stream has no known length, so only a number of rows can be set aside.",
                fix="Give a whole number of rows, such as 200.",
            )
        return dataset.skip(validation), dataset.take(validation)
    count = max(1, round(len(dataset) * validation)) if isinstance(validation, float) else validation
    if count >= len(dataset):
        raise ConfigError(
            got=f"{count} of {len(dataset)} rows are asked for validation.",
            need="At least one row must be left to train on.",
            fix="Set fewer rows aside, or give a validation file of its own.",
        )
    parts = dataset.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _load_file(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset

    suffix = _data_suffix(path)
    if suffix not in _BUILDERS:
        raise DataError(
            got=f"{path} has the extension {suffix or '(none)'!r}.",
            need=f"Data files end in one of {_SUPPORTED}, optionally followed by .gz.",
            fix="Rename the file to what it is, or convert it to JSON lines: one object per line.",
        )
    if path.stat().st_size == 0:
        raise _empty(path)
    builder = _BUILDERS[suffix]
    try:
        options = _as_written(path, "\t" if suffix == ".tsv" else ",") if builder == "csv" else {}
        return load_dataset(
            builder, data_files={"train": str(path)}, split=split, streaming=streaming, **options
        )
    except Exception as error:
        raise _explain(error, path, split) from error


def _as_written(path: Path, delimiter: str) -> dict[str, Any]:
    """Options that keep the cells of a table as the texts they are: ``5`` and ``NA`` are answers too."""
    import pandas
    from datasets import Features, Value

    columns = pandas.read_csv(path, sep=delimiter, nrows=0).columns
    features = Features({str(column): Value("string") for column in columns})
    return {"sep": delimiter, "features": features, "keep_default_na": False, "na_values": [""]}


def _load_folder(path: Path, split: str, name: str | None, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset

    files = [file for file in path.rglob("*") if file.is_file() and _data_suffix(file) in _BUILDERS]
    if not files:
        raise DataError(
            got=f"The folder {path} holds no data file.",
            need=f"A data folder holds files ending in one of {_SUPPORTED}, or was written by save_to_disk.",
            fix="Give the folder that holds the files, or the file itself.",
        )
    try:
        return load_dataset(str(path), name=name, split=split, streaming=streaming)
    except Exception as error:
        raise _explain(error, path, split) from error


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_from_disk

    try:
        loaded = load_from_disk(str(path))
        if not isinstance(loaded, DatasetDict):
            loaded = DatasetDict({str(loaded.split or "train").partition("[")[0]: loaded})
        parts = ReadInstruction.from_spec(split).to_absolute(loaded.num_rows)
        wanted = [(loaded[part.splitname], slice(part.from_, part.to)) for part in parts]
        cuts = [(rows, range(len(rows))[cut]) for rows, cut in wanted]
    except Exception as error:
        raise _explain(error, path, split) from error
    chosen = [rows.select(cut) for rows, cut in cuts if cut]
    if not chosen:
        raise _empty(path)
    rows = concatenate_datasets(chosen)
    return rows.to_iterable_dataset() if streaming else rows


def _load_hub(
    source: str, split: str, name: str | None, token: str | None, streaming: bool
) -> Dataset | IterableDataset:
    from datasets import load_dataset

    if not _HUB_ID.fullmatch(source) or Path(source).suffix in {*_BUILDERS, *_COMPRESSED}:
        path = Path(source).expanduser()
        near = did_you_mean(path.name, _siblings(path))
        raise DataError(
            got=f"{source} does not exist, and it is not the id of a data set on the hub (owner/name).",
            need="The data must be a file, a folder or a hub id.",
            fix=near or f"Check the path; it is looked up from {Path.cwd()}.",
        )
    try:
        return load_dataset(source, name=name, split=split, token=token, streaming=streaming)
    except Exception as error:
        raise _explain_hub(error, source, split) from error


def _siblings(path: Path) -> list[str]:
    return [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []


def _data_suffix(path: Path) -> str:
    """The extension that says the format: ``.jsonl`` for both ``a.jsonl`` and ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _refuse_empty(rows: Dataset | IterableDataset, source: str | Path, split: str) -> None:
    """Read one row: a stream meets its first error here and not in the middle of the set-up."""
    try:
        next(iter(rows))
    except StopIteration:
        raise _empty(source) from None
    except Exception as error:
        raise _explain(error, Path(source).expanduser(), split) from error


def _empty(source: str | Path) -> DataError:
    return DataError(
        got=f"{source} holds no rows.",
        need="Training needs at least one row.",
        fix="Check that the file was written completely and that the right split is chosen.",
    )


def _explain(error: Exception, path: Path, split: str) -> DataError:
    """What went wrong while reading ``path``, as a sentence about the user's file."""
    message = _innermost(error)
    if known := _KNOWN_SPLITS.search(message):
        return _no_such_split(str(path), split, known[1])
    if "corresponds to no data" in message:
        return _empty(path)
    if "scripts are no longer supported" in message:
        return DataError(
            got=f"{path} holds a loading script.",
            need="Code that comes with a data set is never run.",
            fix="Convert the data to JSON lines, CSV or Parquet, and give them without the script.",
        )
    file, where = _broken_json(path)
    return DataError(
        got=f"{file} cannot be read: {(where or message).rstrip('.')}.",
        need="Each JSON line is one object, and all rows of a CSV or Parquet file have the same columns.",
        fix="Correct or remove that line." if where else "Check that the file is complete and in UTF-8.",
    )


def _explain_hub(error: Exception, source: str, split: str) -> DataError:
    message = _innermost(error)
    if known := _KNOWN_SPLITS.search(message):
        return _no_such_split(source, split, known[1])
    if isinstance(error, ConnectionError):
        return DataError(
            got=f"There is neither a file or folder {source} here nor a cached data set of that name, and "
            "the hub cannot be reached.",
            need="The data must be a path that exists or a data set that can be downloaded.",
            fix="Check the path. To use the hub, go online and unset HF_HUB_OFFLINE; for a machine without "
            f"network, run `hf download --repo-type dataset {source} --local-dir data` elsewhere and give "
            "that folder.",
        )
    if "Config name is missing" in message:
        return DataError(
            got=f"The data set {source} has several configurations.",
            need=message.splitlines()[0].rstrip(".") + ".",
            fix="Choose one with name=... (dataset_config_name in a configuration file).",
        )
    return DataError(
        got=f"The data set {source} cannot be loaded: {message.rstrip('.')}.",
        need="It must be a path that exists, or a data set on the hub that you may read.",
        fix="Check the spelling; for a private or gated data set, accept its terms and give token=... or run "
        "`hf auth login`.",
    )


def _no_such_split(source: str, split: str, known: str) -> DataError:
    return DataError(
        got=f"{source} has no split {split!r}; it has {known}.",
        need="The split must be one of these (a slice such as train[:10%] needs streaming off).",
        fix="Name one of them in split.",
    )


def _innermost(error: BaseException) -> str:
    """The message of the error that started the chain: ``datasets`` wraps it in a general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{error}".strip() or type(error).__name__


def _broken_json(path: Path) -> tuple[Path, str]:
    """The first JSON file under ``path`` that does not parse, and where (empty when all of them do)."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix.lower() in {".jsonl", ".ndjson"} and (where := _broken_line(file)):
            return file, where
        if file.suffix.lower() == ".json" and (where := _broken_document(file)):
            return file, where
    return path, ""


def _broken_line(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                return f"line {number} is not valid JSON ({error.msg} at column {error.colno})"
            if not isinstance(row, dict):
                return f"line {number} is not a JSON object but {type(row).__name__}"
    return ""


def _broken_document(file: Path) -> str:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # A .json file may also be JSON lines; its first line tells.
        if error.msg == "Extra data":
            return _broken_line(file)
        return f"line {error.lineno} is not valid JSON ({error.msg} at column {error.colno})"
    return ""
