"""Reads a dataset split: a file, a folder or a hub name, through the `datasets` package.

`datasets` does the reading; this module decides which of its readers is meant, and turns its
exceptions into one line that names the file, the line and the way out.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import DataError, MissingPackageError, did_you_mean

if TYPE_CHECKING:
    import datasets

_READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
# What pyarrow, pandas and json raise through `datasets`; pyarrow's and pandas' are ValueErrors.
_READ_ERRORS = (ValueError, TypeError, KeyError, OSError, EOFError, StopIteration, zlib.error)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def load_dataset_split(
    name_or_path: str | os.PathLike[str], split: str = "train", *, config: str | None = None
) -> datasets.Dataset:
    """Returns one split of a dataset.

    name_or_path: a .jsonl, .json, .parquet, .csv or .tsv file (also .gz), a folder (saved by
    `save_to_disk`, or holding such files), or a name on the hub. A lone file is the split `train`.
    split: a name, a slice such as `train[:90%]`, or a sum of them, as `datasets` writes it.
    config: the hub dataset's configuration. Raises DataError for whatever is missing or torn.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.exists():
        loaded = _load_folder(path) if path.is_dir() else _load_file(path)
        if config is not None:
            raise DataError(f"{name} is local and has no configuration {config!r}; leave it out")
    elif _looks_like_path(name):
        raise DataError(_missing_file(path))
    else:
        loaded = _load_from_hub(name, config)
    return _take_split(loaded, split, name)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"reading a dataset needs the `datasets` package ({error}); pip install datasets"
        ) from None
    return datasets


def _reader(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s not in _COMPRESSED]
    return _READERS.get(suffixes[-1].lower()) if suffixes else None


def _looks_like_path(name: str) -> bool:
    starts = name.startswith((".", "/", "~")) or os.path.isabs(name)
    return starts or name.count("/") > 1 or _reader(Path(name)) is not None or "\\" in name


def _missing_file(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"no dataset at {path}: the folder {parent} does not exist"
    near = did_you_mean(path.name, [entry.name for entry in parent.iterdir()])
    return f"no dataset at {path}{near}"


def _load_file(path: Path) -> datasets.DatasetDict:
    reader = _reader(path)
    if reader is None:
        raise DataError(
            f"{path}: cannot tell the format from the name; use .jsonl, .json, .parquet, .csv or "
            ".tsv (also .gz)"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return _load(reader, path, data_files={"train": str(path)}, **_reader_options([path]))


def _reader_options(files: Iterable[Path]) -> dict[str, Any]:
    """For CSV: the text "None" or "NA" is an answer, not a missing value."""
    files = [file for file in files if _reader(file) == "csv"]
    if not files:
        return {}
    separated = {"sep": "\t"} if any(".tsv" in file.suffixes for file in files) else {}
    return {"keep_default_na": False, **separated}


def _load_folder(path: Path) -> datasets.DatasetDict:
    package = _datasets()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = package.load_from_disk(str(path))
        except (package.exceptions.DatasetsError, *_READ_ERRORS) as error:
            raise DataError(f"{path}: saved dataset cannot be read: {_one_line(error)}") from error
        return (
            package.DatasetDict({"train": loaded})
            if isinstance(loaded, package.Dataset)
            else loaded
        )
    files = [file for file in path.rglob("*") if file.is_file() and _reader(file)]
    if not files:
        raise DataError(
            f"{path} holds no dataset: neither one written by save_to_disk nor .jsonl, .json, "
            ".parquet, .csv or .tsv files"
        )
    return _load(str(path), path, **_reader_options(files))


def _load(reader: str, path: Path, **kwargs: Any) -> datasets.DatasetDict:
    package = _datasets()
    try:
        return package.load_dataset(reader, **kwargs)
    except (package.exceptions.DatasetsError, *_READ_ERRORS) as error:
        raise DataError(_diagnosis(path, error)) from error


def _load_from_hub(name: str, config: str | None) -> datasets.DatasetDict:
    package = _datasets()
    try:
        return package.load_dataset(name, config)
    except package.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"no file, folder or hub dataset is called {name!r}: {_one_line(error)}"
        ) from error
    except (ConnectionError, OSError, package.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is no local file or folder, and the hub gave: {_one_line(error)}"
        ) from error
    except ValueError as error:  # unknown or missing configuration
        raise DataError(f"hub dataset {name!r}: {_one_line(error)}") from error


def _take_split(loaded: Any, split: str, name: str) -> datasets.Dataset:
    package = _datasets()
    lengths = {key: len(part) for key, part in loaded.items()}
    for wanted in re.split(r"\+", split):
        base = wanted.split("[")[0].strip()
        if base not in lengths:
            some = next(iter(lengths), "train")
            raise DataError(
                f"{name} has no split {base!r}, only {', '.join(map(repr, lengths))}"
                f"{did_you_mean(base, lengths)}; a part of a split serves as one too: "
                f"dataset_train_split '{some}[:90%]' and dataset_test_split '{some}[90%:]'"
            )
    try:
        parts = package.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"split {split!r} of {name}: {_one_line(error)}; write it as train[:90%]"
        ) from error
    chosen = [loaded[p.splitname].select(range(p.from_ or 0, _end(p, lengths))) for p in parts]
    result = chosen[0] if len(chosen) == 1 else package.concatenate_datasets(chosen)
    if len(result) == 0:
        raise DataError(f"split {split!r} of {name} holds no rows")
    return result


def _end(part: Any, lengths: dict[str, int]) -> int:
    return lengths[part.splitname] if part.to is None else part.to


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _diagnosis(path: Path, error: Exception) -> str:
    """One line on why a file cannot be read: the torn line where there is one, else the cause."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    for file in files:
        if _reader(file) == "json" and (found := _json_fault(file)):
            return found
    cause = error.__cause__ or error
    if "corresponds to no data" in str(cause):
        return f"{path} holds no rows"
    return f"{path} cannot be read: {_one_line(cause)}"


def _json_fault(path: Path) -> str | None:
    """Names the first line that is not a JSON object, or returns None where all of them are."""
    try:
        lines = ((n, line) for n, line in enumerate(_text_lines(path), start=1) if line.strip())
        number, first = next(lines, (0, ""))
        if not first:
            return f"{path} is empty"
        if first.lstrip()[0] == "[" or first.strip() == "{":  # one document over many lines
            with _open_text(path) as file:
                document = json.load(file)
            return f"{path} holds no rows" if not document else None
        for n, line in itertools.chain([(number, first)], lines):
            if fault := _line_fault(line):
                return f"{path}, line {n}: {fault}"
    except json.JSONDecodeError as error:
        return f"{path}, line {error.lineno}: not valid JSON ({error.msg})"
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
    except (OSError, EOFError, zlib.error) as error:
        return f"{path} cannot be read: {_one_line(error)}"
    return None


def _line_fault(line: str) -> str | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not valid JSON ({error.msg} at column {error.colno}); is the line torn?"
    if not isinstance(value, dict):
        return f"expected a JSON object with the columns as keys, got {str(value)[:40]!r}"
    return None


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _text_lines(path: Path) -> Iterator[str]:
    with _open_text(path) as file:
        yield from file
