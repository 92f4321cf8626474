"""Unpaired data before any model: rows with a label, pairs taken apart, what a mismatched response
is, and which rows are refused."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from fastdpo.data import TokenizedPairs, tokenize_pairs
from fastdpo.data_pairs import mismatch_sources, unpaired, with_mismatches
from fastdpo.errors import DataError
from tests.tiny import tiny_examples, tiny_pairs, tiny_rows, tiny_tokenizer


def examples_of(rows: list[dict] | Dataset, **options) -> tuple[TokenizedPairs, Any]:
    given = {"max_length": None, "mismatch_block": 4, "progress": False, **options}
    return tokenize_pairs(rows, tiny_tokenizer(), number_columns=["label"], **given)


@pytest.mark.parametrize(
    "n, block, source",
    [
        (8, 4, [3, 0, 1, 2, 7, 4, 5, 6]),
        (6, 4, [3, 0, 1, 2, 5, 4]),
        (5, 4, [4, 0, 1, 2, 3]),  # not alone with its own response
        (5, 9, [4, 0, 1, 2, 3]),
        (3, 1, [0, 1, 2]),
        (1, 4, [0]),
    ],
)
def test_mismatched_responses_are_the_neighbours(n, block, source):
    pairs = tiny_pairs(n)
    sources = mismatch_sources(n, block)
    assert sources.tolist() == source
    found = with_mismatches(pairs, sources, max_length=24)
    for i in range(n):
        room = 24 - len(pairs.prompt(i))
        assert found.prompt(i).tolist() == pairs.prompt(i).tolist()
        assert found.chosen(i).tolist() == pairs.chosen(i)[:room].tolist()
        # The whole neighbour's response, cut for this prompt and not for its own.
        assert found.rejected(i).tolist() == pairs.chosen(source[i])[:room].tolist()


def test_pairs_become_examples_in_trls_order():
    unpair_preference_dataset = pytest.importorskip("trl.data_utils").unpair_preference_dataset
    n = 1203  # more than one run of 1000
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "w": i} for i in range(n)]
    expected = unpair_preference_dataset(Dataset.from_list(rows))
    ids = [[i] for i in range(n)]
    pairs = TokenizedPairs.from_lists(
        ids, [[i + 10_000] for i in range(n)], [[i] for i in range(n)]
    )
    found = unpaired(
        TokenizedPairs(pairs.ids, pairs.offsets, pairs.rows, {"w": np.arange(1.0 * n)})
    )
    assert [f"p{found.prompt(i)[0]}" for i in range(2 * n)] == expected["prompt"]
    assert found.columns["label"].astype(bool).tolist() == expected["label"]
    assert found.columns["w"].astype(int).tolist() == expected["w"] == found.rows.tolist()
    texts = [
        f"c{r - 10_000}" if r >= 10_000 else f"r{r}"
        for r in (found.chosen(i)[0] for i in range(2 * n))
    ]
    assert texts == expected["completion"]


def test_examples_and_their_report():
    rows = tiny_examples(9)
    for dataset in (rows, Dataset.from_list(rows)):
        examples, report = examples_of(dataset)
        assert examples.columns["label"].tolist() == [float(row["label"]) for row in rows]
        assert (report.n_pairs, report.n_desirable, report.format) == (9, 6, "unpaired")
        assert "9 rows -> 9 examples (6 desirable)" in report.lines()[0]
        assert not report.unused_columns and report.n_without_eos == 0
    short, report = examples_of(rows, max_length=24)
    assert report.n_truncated_chosen and short.lengths[:, 1:].sum(1).max() < 48
    assert (short.lengths[:, :1] + short.lengths[:, 1:]).max() == 24
    assert any("24:" in line and "responses" in line for line in report.lines())
    numbers, _ = examples_of([{**row, "label": int(row["label"])} for row in rows])
    assert np.array_equal(numbers.columns["label"], examples.columns["label"])
    paired, report = examples_of(tiny_rows(5, pairs_per_prompt=1))
    assert len(paired) == 10 and report.n_desirable == 5
    assert (
        examples_of(rows, mismatch_block=1)[0].rejected(2).tolist() == examples.chosen(2).tolist()
    )
    assert report.n_mismatched_own_prompt == 0
    _, report = examples_of(
        [{**row, "prompt": rows[i // 3]["prompt"]} for i, row in enumerate(rows)]
    )
    # Three in a row: the second and third of each, but for the one that begins a block.
    assert report.n_mismatched_own_prompt == 5
    assert any("shuffle the rows" in line for line in report.lines())
    only = [{**row, "label": True} for row in rows]
    assert "undesirable 0 " in " ".join(examples_of(only)[1].lines())


@pytest.mark.parametrize(
    "change, options, parts",
    [
        ({"label": 2}, {}, ["row 2", "'label' is 2", "true or false"]),
        ({"label": "yes"}, {}, ["row 2", "'label'", "'yes'"]),
        ({"label": None}, {}, ["row 2", "'label' is None", "on_bad_row=drop"]),
        ({"completion": "  "}, {}, ["row 2", "'completion' is empty"]),
        ({"completion": 3}, {}, ["row 2", "'completion'", "int"]),
        ({}, {"mismatch_block": None}, ["is unpaired", "use loss_type kto"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_rows_are_named(change, options, parts):
    rows = tiny_examples(5)
    rows[2] = {**rows[2], **change}
    with pytest.raises(DataError) as caught:
        examples_of(rows, **options)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_bad_rows_can_be_dropped():
    rows = tiny_examples(6)
    rows[1] = {**rows[1], "completion": ""}
    rows[2] = {**rows[2], "label": None}
    examples, report = examples_of(rows, on_bad_row="drop")
    assert examples.rows.tolist() == [0, 3, 4, 5]
    assert (report.n_dropped_empty, report.n_dropped_none) == (1, 1)
    assert examples.columns["label"].tolist() == [1, 1, 0, 1]
