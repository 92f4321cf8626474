"""Preference pairs as token ids: what the packer, the reference and the trainer read.

`tokenize_pairs` is the whole way from rows to pairs; it reads top to bottom at the end of the file.
Not here: reading files (data_sources.py), understanding columns (data_formats.py), templates and
truncation (data_encode.py).
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fastdpo.data_columns import read_columns, require_columns
from fastdpo.data_encode import Encoded, EncodePlan, Problem, encode_rows
from fastdpo.data_formats import detect_format, used_columns
from fastdpo.data_report import DataReport, LengthSummary
from fastdpo.data_sources import load_dataset_split
from fastdpo.errors import ConfigError, DataError, did_you_mean

__all__ = ["DataReport", "TokenizedPairs", "load_dataset_split", "tokenize_pairs"]

ON_BAD_ROW = ("error", "drop", "keep")
_ROWS_PER_BATCH = (
    1000  # enough to keep a fast tokenizer's threads busy, few enough to show progress
)
_ROWS_WORTH_A_PROCESS = 10_000  # about a second of Python work; a fork costs a tenth


@dataclass(frozen=True)
class TokenizedPairs:
    """n pairs in flat ragged storage; every response is already cut to `max_length`.

    ids [sum of lengths] int32: prompt, chosen, rejected of pair 0, then of pair 1, and so on.
    offsets [3n + 1] int64: where each of them starts in `ids`; the last entry is len(ids).
    rows [n] int64: the row of the user's dataset that each pair came from.
    columns: numbers of the dataset's own that losses use (`weight`, …), [n] fp64 each.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def _part(self, i: int, which: int) -> np.ndarray:
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"pair {i} of {n}")
        k = 3 * (i % n) + which
        return self.ids[self.offsets[k] : self.offsets[k + 1]]

    def prompt(self, i: int) -> np.ndarray:
        """Prompt token ids of pair i: a view, int32."""
        return self._part(i, 0)

    def chosen(self, i: int) -> np.ndarray:
        """Token ids of pair i's chosen response, without the prompt: a view, int32."""
        return self._part(i, 1)

    def rejected(self, i: int) -> np.ndarray:
        """Token ids of pair i's rejected response, without the prompt: a view, int32."""
        return self._part(i, 2)

    @property
    def lengths(self) -> np.ndarray:
        """[n, 3] int64: tokens in the prompt, the chosen and the rejected response."""
        return np.diff(self.offsets).reshape(-1, 3)

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedPairs:
        """The pairs at `indices`, in that order, repeats allowed; `rows` still name the dataset."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]  # [m, 3]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = self.offsets[3 * indices] if len(indices) else np.zeros(0, np.int64)
        pair_lengths = lengths.sum(1)
        # One gather: position within the new storage, shifted to where that pair lies in the old.
        shift = np.repeat(starts - offsets[:-1:3], pair_lengths)
        ids = self.ids[np.arange(len(shift)) + shift]
        columns = {name: values[indices] for name, values in self.columns.items()}
        return TokenizedPairs(ids, offsets, self.rows[indices], columns)

    @property
    def scored_lengths(self) -> np.ndarray:
        """[n, 2] int64: scored tokens of chosen and rejected. Behind an empty prompt nothing
        predicts a response's first token: it is not scored."""
        lengths = self.lengths
        unscored = (lengths[:, :1] == 0) & (lengths[:, 1:] > 0)
        return lengths[:, 1:] - unscored

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        chosens: Sequence[Sequence[int]],
        rejecteds: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
    ) -> TokenizedPairs:
        """Builds the flat storage from n lists of token ids each; `rows` defaults to 0..n-1."""
        parts = [
            np.asarray(part, dtype=np.int32)
            for pair in zip(prompts, chosens, rejecteds, strict=True)
            for part in pair
        ]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        n = len(parts) // 3
        return cls(ids, offsets, np.asarray(range(n) if rows is None else rows, dtype=np.int64))


def tokenize_pairs(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    on_bad_row: str = "error",
    dataset_format: str = "auto",
    num_proc: int | None = None,
    name: str = "train",
    progress: bool = True,
    number_columns: Sequence[str] = (),
) -> tuple[TokenizedPairs, DataReport]:
    """Tokenizes every row once.

    dataset: a `datasets.Dataset` or a list of dicts. tokenizer: a transformers tokenizer; None is
    enough for columns of token ids. max_length: most tokens of prompt + response; a response loses
    its end, and a pair whose prompt alone fills it is dropped; None for no limit.
    on_bad_row: `error`, `drop` or `keep` rows with an empty response or identical ones; a None is
    an error unless dropped. num_proc: processes; by default as many as the rows are worth.
    name: what progress, report and errors call the dataset. number_columns: columns of numbers to
    carry along (data_columns.py says which there are).
    Raises DataError naming row and column; ConfigError for an option outside its domain.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ConfigError(
            f"on_bad_row={on_bad_row!r}{did_you_mean(str(on_bad_row), ON_BAD_ROW)}; "
            f"one of {', '.join(ON_BAD_ROW)}"
        )
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length={max_length}: at least 1, or none for no limit")
    columns, rows = _rows_of(dataset, name)
    n_rows = len(rows)
    if n_rows == 0:
        raise DataError(f"the {name} dataset has no rows")
    try:
        format_name = detect_format(dataset_format, columns, _take(rows, 0, min(n_rows, 16)))
    except DataError as error:
        raise DataError(f"{name} dataset: {error}") from None
    used = used_columns(format_name) | set(number_columns)
    require_columns(number_columns, columns, name)
    if hasattr(rows, "select_columns"):
        rows = rows.select_columns([c for c in columns if c in used])

    soft = {"empty", "identical", "identical_cut"}
    plan = EncodePlan(
        tokenizer=tokenizer,
        format_name=format_name,
        max_length=max_length,
        fatal=frozenset(
            {"error": soft | {"none", "unscored"}, "keep": {"none", "unscored"}, "drop": ()}[
                on_bad_row
            ]
        ),
        dropped=frozenset({"none", "unscored", "tie"} | (soft if on_bad_row == "drop" else set())),
    )
    starts = range(0, n_rows, _ROWS_PER_BATCH)
    parts: list[Encoded] = []
    n_fatal = 0
    with (
        _encoded(rows, starts, plan, _n_processes(num_proc, n_rows)) as batches,
        tqdm(total=n_rows, desc=f"Tokenizing {name}", unit=" rows", disable=not progress) as bar,
    ):
        try:
            for start, part in zip(starts, batches, strict=True):
                parts.append(part)
                n_fatal += sum(p.kind in plan.fatal for p in part.problems)
                bar.update(min(_ROWS_PER_BATCH, n_rows - start))
        except DataError as error:
            raise DataError(f"{name} dataset, {error}") from None
    problems = [problem for part in parts for problem in part.problems]
    if n_fatal:
        raise DataError(_bad_rows(name, [p for p in problems if p.kind in plan.fatal], max_length))
    pairs, report = _assemble(parts, problems, plan, name, n_rows, on_bad_row, columns, used)
    if number_columns:
        pairs = replace(pairs, columns=read_columns(rows, number_columns, pairs.rows, name))
    return pairs, report


def _rows_of(dataset: Any, name: str) -> tuple[list[str], Any]:
    """The column names, and something that `_take` can slice."""
    if isinstance(dataset, dict):  # DatasetDict is one
        raise DataError(
            f"the {name} dataset is a dictionary of {', '.join(map(repr, dataset))}; "
            "pass one of them"
        )
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        other = next((row for row in dataset if not isinstance(row, dict)), None)
        if other is not None:
            raise DataError(f"the {name} dataset holds a {type(other).__name__}; rows are dicts")
        return list(dict.fromkeys(key for row in dataset for key in row)), dataset
    if isinstance(dataset, str) or not all(
        hasattr(dataset, attribute) for attribute in ("column_names", "__len__", "with_format")
    ):
        raise DataError(
            f"the {name} dataset is a {type(dataset).__name__}; expected a datasets.Dataset or a "
            "list of dicts (streaming datasets are read by Dataset.from_list(list(stream)))"
        )
    return list(dataset.column_names), dataset.with_format(None)


def _take(rows: Any, start: int, stop: int) -> list[dict]:
    if isinstance(rows, Sequence):
        return list(rows[start:stop])
    try:
        batch = rows[start:stop]
    except UnicodeDecodeError as error:
        raise DataError(
            f"rows {start} to {stop - 1}: text that is not UTF-8 ({error.reason}); convert the file"
        ) from error
    keys = list(batch)
    return [dict(zip(keys, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _n_processes(num_proc: int | None, n_rows: int) -> int:
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, min(cores or 1, 16, n_rows // _ROWS_WORTH_A_PROCESS)) if can_fork else 1
    if num_proc < 1:
        raise ConfigError(f"dataset_num_proc={num_proc}: at least 1")
    if num_proc > 1 and not can_fork:
        raise ConfigError("dataset_num_proc > 1 needs fork, which this system lacks; use 1")
    return min(num_proc, -(-n_rows // _ROWS_PER_BATCH))


_work: tuple[Any, EncodePlan] | None = None  # what a worker process encodes; inherited by fork


def _start_worker(rows: Any, plan: EncodePlan) -> None:
    global _work
    _work = (rows, plan)


def _encode_batch(start: int) -> Encoded:
    global _work
    assert _work is not None
    rows, plan = _work
    part = encode_rows(_take(rows, start, start + _ROWS_PER_BATCH), start, plan)
    if any(problem.kind in plan.fatal for problem in part.problems):
        _work = rows, replace(plan, scan_only=True)  # the run will end: only count the others
    return part


@contextmanager
def _encoded(
    rows: Any, starts: Iterable[int], plan: EncodePlan, n_processes: int
) -> Iterator[Iterator[Encoded]]:
    """Yields the batches' results in order."""
    global _work
    if n_processes == 1:  # the tokenizer itself uses threads
        _start_worker(rows, plan)
        try:
            yield map(_encode_batch, starts)
        finally:
            _work = None
        return
    # A tokenizer that has used its threads must not use them after a fork; saying so beforehand
    # spares its warning.
    variable = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(variable)
    os.environ[variable] = "false"
    try:
        with ProcessPoolExecutor(
            n_processes,
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start_worker,
            initargs=(rows, plan),
        ) as pool:
            try:
                yield pool.map(_encode_batch, starts)
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if not isinstance(error, BrokenProcessPool):
                    raise
                raise DataError(
                    f"one of {n_processes} tokenizing processes was killed (out of memory?); "
                    "lower dataset_num_proc"
                ) from None
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _bad_rows(name: str, problems: list[Problem], max_length: int | None) -> str:
    """One line: of each kind the first row and how many, then the way out."""
    texts = {
        "none": "{column!r} is None",
        "empty": "{column!r} is empty",
        "identical": "{column} are identical",
        "identical_cut": "{column} are identical once cut to max_length={max_length}",
        "unscored": "{column!r} has no token to score",
    }
    kinds = Counter(problem.kind for problem in problems)
    firsts: dict[str, Problem] = {}
    for problem in problems:
        firsts.setdefault(problem.kind, problem)
    found = [
        f"row {p.row} (from 0): {texts[kind].format(column=p.column, max_length=max_length)} "
        f"({kinds[kind]:,} such row{'s' if kinds[kind] > 1 else ''})"
        for kind, p in firsts.items()
    ]
    way_out = "on_bad_row=drop (--on_bad_row drop) leaves such rows out"
    if not kinds.keys() & {"none", "unscored"}:
        way_out += ", keep trains on them"
    if "identical_cut" in kinds:
        way_out += ", a larger max_length keeps them apart"
    return f"{name} dataset, {'; '.join(found)}; {way_out}"


def _assemble(
    parts: list[Encoded],
    problems: list[Problem],
    plan: EncodePlan,
    name: str,
    n_rows: int,
    on_bad_row: str,
    columns: list[str],
    used: set[str],
) -> tuple[TokenizedPairs, DataReport]:
    lengths = np.concatenate([part.lengths for part in parts])  # [n, 3]
    offsets = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.concatenate([part.ids for part in parts])
    pairs = TokenizedPairs(ids, offsets, np.concatenate([part.rows for part in parts]))
    counts = sum((part.counts for part in parts), Counter())
    kinds = Counter(problem.kind for problem in problems)
    if len(pairs) == 0:
        raise DataError(_nothing_left(name, n_rows, counts, kinds, parts, plan))
    dropped = {f"n_dropped_{kind}": kinds[kind] for kind in plan.dropped}
    report = DataReport(
        name=name,
        format=plan.format_name,
        on_bad_row=on_bad_row,
        max_length=plan.max_length,
        n_rows=n_rows,
        n_pairs=len(pairs),
        n_prompts=len({pairs.prompt(i).tobytes() for i in range(len(pairs))}),
        prompt_tokens=_summary(lengths[:, 0]),
        chosen_tokens=_summary(lengths[:, 1]),
        rejected_tokens=_summary(lengths[:, 2]),
        **dropped,
        n_dropped_long_prompt=counts["long_prompt"],
        n_kept_bad=sum(n for kind, n in kinds.items() if kind not in plan.dropped),
        n_truncated_chosen=counts["truncated_chosen"],
        n_truncated_rejected=counts["truncated_rejected"],
        n_identical_cut=kinds["identical_cut"],
        prompt_boundary_moved=counts["boundary_moved"],
        n_repeats_prompt=counts["repeats_prompt"],
        n_double_bos=counts["double_bos"],
        n_without_eos=counts["without_eos"],
        n_empty_prompt=counts["empty_prompt"],
        unused_columns=tuple(column for column in columns if column not in used),
        example=_example(pairs, plan.tokenizer),
    )
    return pairs, report


def _nothing_left(
    name: str,
    n_rows: int,
    counts: Counter[str],
    kinds: Counter[str],
    parts: list[Encoded],
    plan: EncodePlan,
) -> str:
    reasons = [f"{n:,} are dropped as {kind.replace('_', ' ')}" for kind, n in kinds.items()]
    way_out = "mend the dataset"
    if n := counts["long_prompt"]:
        longest = max(part.longest_prompt for part in parts)
        reasons.insert(
            0,
            f"{n:,} ({n / n_rows:.0%}) have a prompt of at least max_length={plan.max_length} "
            f"tokens (the longest has {longest:,})",
        )
        way_out = "raise --max_length"
    return f"{name} dataset: of {n_rows:,} rows none is left, {' and '.join(reasons)}; {way_out}"


def _summary(lengths: np.ndarray) -> LengthSummary:
    return LengthSummary(int(lengths.sum()), int(np.median(lengths)), int(lengths.max()))


def _example(pairs: TokenizedPairs, tokenizer: Any) -> str:
    """The first pair as text, a bar where the prompt ends and the response begins."""

    def text(ids: np.ndarray) -> str:
        return str(ids.tolist()) if tokenizer is None else tokenizer.decode(ids.tolist())

    prompt, chosen, rejected = (
        text(ids) for ids in (p(0) for p in (pairs.prompt, pairs.chosen, pairs.rejected))
    )
    before = repr(prompt if len(prompt) <= 120 else "…" + prompt[-119:])
    return "\n".join(
        f"row {pairs.rows[0]}, {side}: {before} | {_shortened(response)!r}"
        for side, response in (("chosen", chosen), ("rejected", rejected))
    )


def _shortened(text: str, limit: int = 120) -> str:
    """Beginning and end: the end shows EOS, or its absence."""
    return text if len(text) <= limit else f"{text[: limit - 31]} … {text[-28:]}"
