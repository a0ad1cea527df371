"""Rows from every kind of path, and one sentence for everything that goes wrong."""

from __future__ import annotations

import gc
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from pantheraml.data.sources import load_rows, split_rows
from pantheraml.errors import ConfigError, DataError

# datasets leaves the file open when it has read a table; the fixture below collects it under this filter.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

ROWS = [{"instruction": f"Question {i}", "output": f"Answer {i}"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    gc.collect()


def write(folder, name):
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".csv"):
        Dataset.from_list(ROWS).to_csv(path)
    elif name.endswith(".tsv"):
        Dataset.from_list(ROWS).to_csv(path, sep="\t")
    elif name.endswith(".parquet"):
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text(LINES)
    return path


@pytest.mark.promise("D4")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files(name, streaming, tmp_path):
    rows = load_rows(write(tmp_path, name), streaming=streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert list(rows) == ROWS


def test_text_file_is_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert list(load_rows(str(tmp_path / "a.txt"))) == [{"text": "one"}, {"text": "two"}]


def test_cells_of_a_table_are_texts(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd 2 and 3.,,5\nAn element?,1.50,NA\n")
    assert list(load_rows(tmp_path / "a.csv")) == [
        {"instruction": "Add 2 and 3.", "input": None, "output": "5"},
        {"instruction": "An element?", "input": "1.50", "output": "NA"},
    ]


def test_folder_with_splits(tmp_path):
    write(tmp_path, "train.jsonl")
    (tmp_path / "test.jsonl").write_text(LINES.splitlines()[0] + "\n")
    assert len(load_rows(tmp_path)) == 4
    assert len(load_rows(tmp_path, split="test")) == 1
    assert len(load_rows(tmp_path, split="train[:50%]")) == 2
    with pytest.raises(DataError, match=r"has no split 'validation'; it has \['train', 'test'\]"):
        load_rows(tmp_path, split="validation")


def test_saved_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    splits.save_to_disk(tmp_path / "many")
    assert list(load_rows(tmp_path / "one")) == ROWS
    assert list(load_rows(tmp_path / "many", split="test")) == ROWS[:1]
    assert list(load_rows(tmp_path / "many", split="train[1:3]")) == ROWS[1:3]
    assert list(load_rows(tmp_path / "many", split="train[:1]+test")) == [ROWS[0], ROWS[0]]
    assert isinstance(load_rows(tmp_path / "many", streaming=True), IterableDataset)
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(tmp_path / "many", split="test[1:]", streaming=True)
    with pytest.raises(DataError, match=r"has no split 'dev'; it has \['train', 'test'\]"):
        load_rows(tmp_path / "many", split="dev")


def test_missing_path_names_a_near_one(tmp_path):
    write(tmp_path, "train.jsonl")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist.*Did you mean 'train.jsonl'"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="looked up from"):
        load_rows("no/such/folder/at/all")
    with pytest.raises(DataError, match="does not exist"):
        load_rows("nothing.jsonl")


def test_hub_id_without_a_network():
    with pytest.raises(
        DataError, match=r"neither a file or folder owner/rows here.*--repo-type dataset owner/rows"
    ):
        load_rows("owner/rows")


def test_unknown_extension(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"extension '.xlsx'.*\.jsonl, \.json, .*\.csv, .*\.parquet"):
        load_rows(tmp_path / "a.xlsx")


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_line_is_named(streaming, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2\n{"a": 3}\n')
    with pytest.raises(
        DataError, match=r"a.jsonl cannot be read: line 3 is not valid JSON \(.* at column 8\)"
    ):
        load_rows(tmp_path / "a.jsonl", streaming=streaming)


def test_broken_file_of_a_folder_is_named(tmp_path):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"instruction": "x"\n')
    with pytest.raises(DataError, match=r"b.jsonl cannot be read: line 1 "):
        load_rows(tmp_path)


def test_line_that_is_no_object(tmp_path):
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    with pytest.raises(DataError, match="line 1 is not a JSON object but int"):
        load_rows(tmp_path / "a.jsonl")


def test_broken_document(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1},\n{"a": 2]\n')
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        load_rows(tmp_path / "a.json")


def test_json_lines_in_a_json_file(tmp_path):
    (tmp_path / "a.json").write_text(LINES)
    assert list(load_rows(tmp_path / "a.json")) == ROWS
    (tmp_path / "a.json").write_text(LINES + "{")
    with pytest.raises(DataError, match="line 5 is not valid JSON"):
        load_rows(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", "a,b\n"), ("a.json", "[]")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_empty_files(name, text, streaming, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(tmp_path / name, streaming=streaming)


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        load_rows(tmp_path / "a.parquet")


def test_split_of_a_file(tmp_path):
    with pytest.raises(DataError, match=r"has no split 'test'; it has \['train'\]"):
        load_rows(write(tmp_path, "a.jsonl"), split="test")
    assert len(load_rows(tmp_path / "a.jsonl", split="train[:2]")) == 2
    with pytest.raises(DataError, match=r"has no split 'train\[:2\]'.*needs streaming off"):
        load_rows(tmp_path / "a.jsonl", split="train[:2]", streaming=True)


def test_folder_without_data(tmp_path):
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(DataError, match="holds no data file"):
        load_rows(tmp_path)


def test_scripts_are_never_run(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder, "a.jsonl")
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="loading script"):
        load_rows(folder)
    assert not (tmp_path / "ran").exists()


def test_split_rows():
    rows = Dataset.from_dict({"a": list(range(100))})
    train, validation = split_rows(rows, 0.1)
    assert (len(train), len(validation)) == (90, 10)
    assert sorted([*train["a"], *validation["a"]]) == rows["a"][:]
    assert split_rows(rows, 0.1)[1]["a"][:] == validation["a"][:]
    assert split_rows(rows, 0.1, seed=1)[1]["a"][:] != validation["a"][:]
    assert len(split_rows(rows, 7)[1]) == 7
    assert len(split_rows(rows.select(range(3)), 0.01)[1]) == 1


def test_split_rows_of_a_stream():
    rows = Dataset.from_dict({"a": list(range(5))}).to_iterable_dataset()
    train, validation = split_rows(rows, 2)
    assert [row["a"] for row in validation] == [0, 1]
    assert [row["a"] for row in train] == [2, 3, 4]
    with pytest.raises(ConfigError, match="no known length"):
        split_rows(rows, 0.5)


@pytest.mark.parametrize("part", [0, -1, 1.0, 100, True])
def test_split_rows_refuses(part):
    with pytest.raises(ConfigError, match="validation"):
        split_rows(Dataset.from_dict({"a": list(range(100))}), part)
