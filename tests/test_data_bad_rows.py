"""Rows that are empty, identical, missing or malformed: named, dropped or kept; not guessed at."""

import copy

import pytest

from fastdpo.errors import ConfigError, DataError
from tests.tiny import (
    message,
    texts,
    tiny_chat_rows,
    tiny_rows,
    tiny_tokenizer,
    tokenize,
    triple,
)

GOOD = {"prompt": "what", "chosen": " cat", "rejected": " dog"}
EMPTY = {**GOOD, "rejected": "  "}
SAME = {**GOOD, "rejected": " cat"}
NONE = {**GOOD, "chosen": None}


def test_empty_and_identical_rows(plain):
    rows = [GOOD, EMPTY, SAME, GOOD, {**EMPTY, "chosen": "", "rejected": " cat"}]
    with pytest.raises(DataError) as error:
        tokenize(rows, plain)
    text = str(error.value)
    assert "row 1 (from 0): 'rejected' is empty (2 such rows)" in text
    assert "row 2 (from 0): chosen and rejected are identical (1 such row)" in text
    assert "--on_bad_row drop" in text and "keep" in text and "\n" not in text
    pairs, report = tokenize(rows, plain, on_bad_row="drop")
    assert pairs.rows.tolist() == [0, 3]
    assert (report.n_dropped_empty, report.n_dropped_identical, report.n_kept_bad) == (2, 1, 0)
    pairs, report = tokenize(rows, plain, on_bad_row="keep")
    assert pairs.rows.tolist() == [0, 1, 2, 3, 4] and report.n_kept_bad == 3
    assert texts(pairs, plain, 4)[1] == "</s>"
    assert any("kept: 3 rows" in line for line in report.lines())


@pytest.mark.parametrize("bad", [NONE, {k: GOOD[k] for k in ("prompt", "rejected")}])
def test_none_is_an_error_unless_dropped(plain, bad):
    rows = [GOOD, bad, bad]
    for policy in ("error", "keep"):
        with pytest.raises(
            DataError, match=r"row 1 \(from 0\): 'chosen' is None \(2 such"
        ) as error:
            tokenize(rows, plain, on_bad_row=policy)
        assert "--on_bad_row drop" in str(error.value) and "keep" not in str(error.value)
    pairs, report = tokenize(rows, plain, on_bad_row="drop")
    assert pairs.rows.tolist() == [0] and report.n_dropped_none == 2


def test_bad_conversations(chat):
    row = tiny_chat_rows(1)[0]
    for chosen, problem in (
        ([], "'chosen' is empty"),
        ([message("assistant", " ")], "'chosen' is empty"),
        (row["rejected"], "identical"),
        ([message("assistant", None)], "'chosen' is None"),
    ):
        with pytest.raises(DataError, match=problem):
            tokenize([row, {**row, "chosen": chosen}], chat)
        pairs, _ = tokenize([row, {**row, "chosen": chosen}], chat, on_bad_row="drop")
        assert len(pairs) == 1
    # A call of a tool has no content, and is an answer.
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "cat"}]}
    tokenize([{**row, "chosen": [call]}], _printing_none(chat))


def test_a_bad_response_is_named_by_its_column(plain, chat):
    asked = {"context": [message("user", "what")], "response1": "cat", "response2": " "}
    for preference in (-1, 1):  # the second answer is the rejected one, then the chosen one
        with pytest.raises(DataError, match="'response2' is empty"):
            tokenize([{**asked, "overall_preference": preference}], chat)
    pair = {"question": "what", "response_j": "cat", "response_k": "cat"}
    with pytest.raises(DataError, match="response_j and response_k are identical"):
        tokenize([pair], plain)
    cut = {**pair, "response_j": "cat sleeps", "response_k": "cat runs"}
    with pytest.raises(DataError, match="response_j and response_k are identical once cut"):
        prompt = tokenize([cut], plain)[0].lengths[0, 0]
        tokenize([cut], plain, max_length=int(prompt) + 1)


def _printing_none(chat):
    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = chat.chat_template.replace(
        "message['content']", "message['content'] or 'call'"
    )
    return tokenizer


def test_identical_only_after_truncation(plain):
    same_start = "the cat sleeps under the tree "
    row = {"prompt": "what", "chosen": same_start + "often", "rejected": same_start + "never"}
    long, _ = tokenize([row], plain)
    assert triple(long)[1] != triple(long)[2]
    cut = len(triple(long)[0]) + 4
    with pytest.raises(DataError, match=f"row 1 .*identical once cut to max_length={cut} .*1 such"):
        tokenize([GOOD, row], plain, cut)
    pairs, report = tokenize([GOOD, row], plain, cut, on_bad_row="drop")
    assert len(pairs) == 1 and report.n_dropped_identical_cut == report.n_identical_cut == 1
    pairs, report = tokenize([GOOD, row], plain, cut, on_bad_row="keep")
    assert len(pairs) == 2 and report.n_dropped_identical_cut == 0 and report.n_identical_cut == 1


def test_an_empty_prompt_needs_two_tokens_to_score_one():
    tokenizer = tiny_tokenizer(bos=False)
    row = {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6, 7]}
    with pytest.raises(DataError, match="'chosen_ids' has no token to score"):
        tokenize([row], tokenizer)
    pairs, report = tokenize([{**row, "chosen_ids": [5, 6]}], tokenizer)
    assert len(pairs) == 1 and report.n_empty_prompt == 1


def test_nothing_left_gives_the_share(plain):
    with pytest.raises(DataError) as error:
        tokenize(tiny_rows(8), plain, max_length=3)
    text = str(error.value)
    assert "8 (100%) have a prompt of at least max_length=3 tokens" in text
    assert "raise --max_length" in text
    with pytest.raises(DataError, match="of 2 rows none is left, 2 are dropped as empty"):
        tokenize([EMPTY, EMPTY], plain, on_bad_row="drop")


@pytest.mark.parametrize(
    ("rows", "kwargs", "match"),
    [
        ([], {}, "the train dataset has no rows"),
        (
            [{"a": 1, "choosen": "x"}],
            {},
            r"fits.*'a', 'choosen'; for 'choosen' did you mean 'chosen'\?",
        ),
        ([GOOD], {"dataset_format": "sharegpt"}, "'conversations' not among the columns 'prompt'"),
        ([{**GOOD, "chosen": 3}], {}, "row 0: 'chosen' is of type int; expected text or a list"),
        ([{**GOOD, "chosen": ["x"]}], {}, "row 0: 'chosen' holds 'x'; a message needs role"),
        ([{**GOOD, "images": []}], {}, "column 'images'.*text only"),
        ([{**GOOD, "chosen": [message("assistant", "x")]}], {}, "must both be text or both"),
        (tiny_chat_rows(2), {}, "row 0: conversations need a chat template"),
        ({"train": [GOOD]}, {}, "is a dictionary of 'train'; pass one of them"),
        ("rows.jsonl", {}, "is a str; expected a datasets.Dataset"),
        ([GOOD, "row"], {}, "holds a str; rows are dicts"),
    ],
)
def test_one_line_data_errors(plain, rows, kwargs, match):
    with pytest.raises(DataError, match=match) as error:
        tokenize(rows, plain, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"on_bad_row": "dropp"}, "did you mean 'drop'"),
        ({"dataset_format": "explict"}, "did you mean 'explicit'"),
        ({"max_length": 0}, "max_length=0"),
        ({"num_proc": 0}, "dataset_num_proc=0"),
    ],
)
def test_options_outside_their_domain(plain, kwargs, match):
    with pytest.raises(ConfigError, match=match):
        tokenize([GOOD], plain, **kwargs)


def test_template_refusal_names_the_row(chat):
    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + chat.chat_template
    )
    rows = tiny_chat_rows(3)
    rows[2]["prompt"] = [message("system", "x"), *rows[2]["prompt"]]
    with pytest.raises(DataError, match=r"row 2: the chat template .*\(system, user.*no system"):
        tokenize(rows, tokenizer)
