"""Files, folders and splits: every kind gives the same rows, or one line says why not."""

import json

import numpy as np
import pytest

from fastdpo.data import load_dataset_split
from fastdpo.errors import DataError
from tests.tiny import tiny_rows, tokenize

pytestmark = pytest.mark.usefixtures("datasets_apart")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path, plain):
    import gzip

    from datasets import Dataset, DatasetDict

    rows = tiny_rows(5)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    dataset = Dataset.from_list(rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write(tmp_path / "rows.jsonl", lines)
    write(tmp_path / "rows.json", json.dumps(rows, indent=1))
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.to_csv(tmp_path / "rows.csv", index=False)
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(
        tmp_path / "saved_splits"
    )
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    dataset.select([0]).to_parquet(tmp_path / "folder" / "test.parquet")
    expected, _ = tokenize(rows, plain)
    names = "rows.jsonl.gz rows.jsonl rows.json rows.parquet rows.csv saved saved_splits folder"
    for name in names.split():
        loaded = load_dataset_split(tmp_path / name)
        assert loaded.to_list() == rows, name
        pairs, report = tokenize(loaded, plain)
        assert np.array_equal(pairs.ids, expected.ids), name
    assert len(load_dataset_split(str(tmp_path / "folder"), "test")) == 1
    assert len(load_dataset_split(tmp_path / "saved_splits", "train+test")) == 6
    assert load_dataset_split(tmp_path / "rows.jsonl", "train[80%:]").to_list() == rows[4:]


def test_csv_words_for_nothing_are_words(tmp_path, plain):
    (tmp_path / "folder").mkdir()
    text = "prompt,chosen,rejected\nwhat,None,NA\nwhat,,null\n"
    path = write(tmp_path / "x.csv", text)
    write(tmp_path / "folder" / "train.csv", text)
    dataset = load_dataset_split(path)
    assert dataset[0] == {"prompt": "what", "chosen": "None", "rejected": "NA"}
    assert load_dataset_split(tmp_path / "folder").to_list() == dataset.to_list()
    with pytest.raises(DataError, match="row 1 .*'chosen' is empty"):
        tokenize(dataset, plain)


def test_files_that_cannot_be_read(tmp_path):
    import gzip

    good = '{"chosen": "a", "rejected": "b"}\n'
    squeezed = gzip.compress((good * 5000).encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(squeezed[: len(squeezed) // 2])
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nested").mkdir()
    write(tmp_path / "nested" / "train.jsonl", good + '{"chosen')
    cases = {
        write(tmp_path / "torn.jsonl", good + good + '{"chosen": "a'): r"torn.jsonl, line 3: not",
        write(tmp_path / "mid.jsonl", good + '{"chosen": "a\n' + good): r"mid.jsonl, line 2: not",
        write(tmp_path / "torn.json", '[\n{"chosen": "a"},\n{"cho'): r"torn.json, line 3: not",
        write(tmp_path / "text.jsonl", '"a"\n"b"\n'): r"line 1: expected a JSON object",
        write(tmp_path / "empty.jsonl", ""): "empty.jsonl is empty",
        write(tmp_path / "empty.json", "[]"): "holds no rows",
        write(tmp_path / "empty.csv", "chosen,rejected\n"): "holds no rows",
        write(tmp_path / "x.foo", "x"): r"cannot tell the format.*\.jsonl",
        tmp_path / "torn.jsonl.gz": "cannot be read: Compressed file ended",
        tmp_path / "bad.parquet": "bad.parquet cannot be read",
        tmp_path / "folder": "holds no dataset",
        tmp_path / "nested": r"train.jsonl, line 2: not valid JSON",
        tmp_path / "trn.jsonl": "no dataset at .*; did you mean 'torn.jsonl'",
        tmp_path / "no" / "x.jsonl": "the folder .*no does not exist",
    }
    for path, match in cases.items():
        with pytest.raises(DataError, match=match) as error:
            load_dataset_split(path)
        assert "\n" not in str(error.value), path


def test_splits_that_are_not_there(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"chosen": "a", "rejected": "b"}\n')
    for split, match in {
        "test": "has no split 'test', only 'train'",
        "trian": "did you mean 'train'",
        "train[a:]": "write it as train",
        "train[:0]": "holds no rows",
    }.items():
        with pytest.raises(DataError, match=match):
            load_dataset_split(path, split)
    with pytest.raises(DataError, match="is local and has no configuration 'en'"):
        load_dataset_split(path, config="en")


def test_text_that_is_not_utf8_is_an_error_not_a_traceback(tmp_path, plain):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "q", "chosen": "é", "rejected": "b"}\n'.encode("latin1"))
    with pytest.raises(DataError, match="not UTF-8"):
        tokenize(load_dataset_split(path), plain)
