"""From rows to preference pairs as token ids: `tokenize_pairs` is the whole way, top to bottom.

Not here: what pairs are (data_pairs.py), reading files (data_sources.py), understanding columns
(data_formats.py), templates and truncation (data_encode.py).
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .data_columns import read_columns, require_columns
from .data_encode import Encoded, EncodePlan, Problem, encode_rows
from .data_formats import FORMATS, UNPAIRED, detect_format, used_columns
from .data_pairs import TokenizedPairs, mismatch_sources, unpaired, with_mismatches
from .data_report import DataReport, LengthSummary
from .data_sources import load_dataset_split
from .errors import ConfigError, DataError, did_you_mean

__all__ = ["DataReport", "TokenizedPairs", "load_dataset_split", "tokenize_pairs"]

ON_BAD_ROW = ("error", "drop", "keep")
# Enough to keep a fast tokenizer's threads busy, few enough to show progress.
_ROWS_PER_BATCH = 1000
_ROWS_WORTH_A_PROCESS = 10_000  # about a second of Python work; a fork costs a tenth


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
    mismatch_block: int | None = None,
) -> tuple[TokenizedPairs, DataReport]:
    """Tokenizes every row once.

    dataset: a `datasets.Dataset` or a list of dicts. tokenizer: a transformers tokenizer; None is
    enough for columns of token ids. max_length: most tokens of prompt + response; a response loses
    its end, and a pair whose prompt alone fills it is dropped; None for no limit.
    on_bad_row: `error`, `drop` or `keep` rows with an empty response or identical ones; a None is
    an error unless dropped. num_proc: processes; by default as many as the rows are worth.
    name: what progress, report and errors call the dataset. number_columns: columns of numbers to
    carry along (data_columns.py says which there are). mismatch_block: for losses of unpaired data:
    single examples, those of paired data too, with mismatched responses from blocks of so many
    neighbours, 1 for none (data_pairs.py).
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
    if format_name == UNPAIRED and mismatch_block is None:
        raise DataError(
            f"the {name} dataset is unpaired ({', '.join(FORMATS[UNPAIRED][0])}), and the "
            "loss is one of pairs; use loss_type kto or apo_zero_unpaired, or give pairs"
        )
    if format_name != UNPAIRED:  # a pair's sides are its labels
        number_columns = [column for column in number_columns if column != "label"]
    used = used_columns(format_name) | set(number_columns)
    require_columns(number_columns, columns, name)
    if hasattr(rows, "select_columns"):
        rows = rows.select_columns([c for c in columns if c in used])

    soft = {"empty", "identical", "identical_cut"}
    plan = EncodePlan(
        tokenizer=tokenizer,
        format_name=format_name,
        max_length=max_length,
        cut=mismatch_block is None,
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
    pairs = _assemble(parts, problems, plan, name, n_rows)
    if number_columns:
        pairs = replace(pairs, columns=read_columns(rows, number_columns, pairs.rows, name))
    if mismatch_block is not None:
        examples = pairs if format_name == UNPAIRED else unpaired(pairs)
        sources = mismatch_sources(len(examples), mismatch_block)
        pairs = with_mismatches(examples, sources, max_length)
    unused = tuple(column for column in columns if column not in used)
    report = _report(pairs, parts, problems, plan, name, n_rows, on_bad_row, unused)
    if mismatch_block is not None and mismatch_block > 1:
        own = sum(np.array_equal(pairs.prompt(i), pairs.prompt(k)) for i, k in enumerate(sources))
        report = replace(report, n_mismatched_own_prompt=own)
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
) -> TokenizedPairs:
    lengths = np.concatenate([part.lengths for part in parts])  # [n, 3]
    offsets = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.concatenate([part.ids for part in parts])
    pairs = TokenizedPairs(ids, offsets, np.concatenate([part.rows for part in parts]))
    if len(pairs) == 0:
        raise DataError(_nothing_left(name, n_rows, problems, parts, plan))
    return pairs


def _report(
    pairs: TokenizedPairs,
    parts: list[Encoded],
    problems: list[Problem],
    plan: EncodePlan,
    name: str,
    n_rows: int,
    on_bad_row: str,
    unused_columns: tuple[str, ...],
) -> DataReport:
    counts = sum((part.counts for part in parts), Counter())
    kinds = Counter(problem.kind for problem in problems)
    prompts, chosen, rejected = pairs.lengths.T
    n_desirable = None
    if not plan.cut:  # examples
        desirable = pairs.columns["label"] > 0
        n_desirable = int(desirable.sum())
        chosen, rejected = chosen[desirable], chosen[~desirable]
    return DataReport(
        name=name,
        format=plan.format_name,
        on_bad_row=on_bad_row,
        max_length=plan.max_length,
        n_rows=n_rows,
        n_pairs=len(pairs),
        n_desirable=n_desirable,
        n_prompts=len({pairs.prompt(i).tobytes() for i in range(len(pairs))}),
        prompt_tokens=_summary(prompts),
        chosen_tokens=_summary(chosen),
        rejected_tokens=_summary(rejected),
        **{f"n_dropped_{kind}": kinds[kind] for kind in plan.dropped},
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
        unused_columns=unused_columns,
        example=_example(pairs, plan),
    )


def _nothing_left(
    name: str,
    n_rows: int,
    problems: list[Problem],
    parts: list[Encoded],
    plan: EncodePlan,
) -> str:
    kinds = Counter(problem.kind for problem in problems)
    reasons = [f"{n:,} are dropped as {kind.replace('_', ' ')}" for kind, n in kinds.items()]
    way_out = "mend the dataset"
    if n := sum(part.counts["long_prompt"] for part in parts):
        longest = max(part.longest_prompt for part in parts)
        reasons.insert(
            0,
            f"{n:,} ({n / n_rows:.0%}) have a prompt of at least max_length={plan.max_length} "
            f"tokens (the longest has {longest:,})",
        )
        way_out = "raise --max_length"
    return f"{name} dataset: of {n_rows:,} rows none is left, {' and '.join(reasons)}; {way_out}"


def _summary(lengths: np.ndarray) -> LengthSummary:
    if not len(lengths):
        return LengthSummary(0, 0, 0)
    return LengthSummary(int(lengths.sum()), int(np.median(lengths)), int(lengths.max()))


def _example(pairs: TokenizedPairs, plan: EncodePlan) -> str:
    """The first pair as text, a bar where the prompt ends and the response begins."""

    def text(ids: np.ndarray) -> str:
        listed = ids.tolist()
        return str(listed) if plan.tokenizer is None else plan.tokenizer.decode(listed)

    prompt, chosen, rejected = (
        text(ids) for ids in (p(0) for p in (pairs.prompt, pairs.chosen, pairs.rejected))
    )
    before = repr(prompt if len(prompt) <= 120 else "…" + prompt[-119:])
    sides = ("chosen", "rejected") if plan.cut else ("response", "mismatched")
    return "\n".join(
        f"row {pairs.rows[0]}, {side}: {before} | {_shortened(response)!r}"
        for side, response in zip(sides, (chosen, rejected), strict=True)
    )


def _shortened(text: str, limit: int = 120) -> str:
    """Beginning and end: the end shows EOS, or its absence."""
    return text if len(text) <= limit else f"{text[: limit - 31]} … {text[-28:]}"
