"""From files and rows to TokenizedPairs: formats, the boundary, bad rows, truncation, errors."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastdpo.data import TokenizedPairs, load_dataset_split, tokenize_pairs
from fastdpo.errors import ConfigError, DataError
from tests.tiny import CHATML, tiny_chat_rows, tiny_pairs, tiny_rows, tiny_tokenizer

HH = Path(__file__).parents[1] / "../shared/data/hh-rlhf/harmless-base-test.jsonl.gz"


@pytest.fixture(scope="module")
def plain():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return tiny_tokenizer(bos=False, chat=True)


def tokenize(rows, tokenizer, max_length: int | None = 256, **kwargs):
    return tokenize_pairs(rows, tokenizer, max_length=max_length, progress=False, **kwargs)


def triple(pairs, i=0):
    return [pairs.prompt(i).tolist(), pairs.chosen(i).tolist(), pairs.rejected(i).tolist()]


def texts(pairs, tokenizer, i=0) -> tuple[str, ...]:
    return tuple(tokenizer.decode(ids) for ids in triple(pairs, i))


# ---- storage --------------------------------------------------------------------------------


def test_pairs_store_and_select():
    pairs = TokenizedPairs.from_lists([[1, 2], []], [[3], [4, 5]], [[6, 7, 8], [9]], rows=[4, 7])
    assert len(pairs) == 2 and pairs.ids.dtype == np.int32 and pairs.offsets.dtype == np.int64
    assert triple(pairs, 0) == [[1, 2], [3], [6, 7, 8]]
    assert triple(pairs, 1) == triple(pairs, -1) == [[], [4, 5], [9]]
    assert pairs.lengths.tolist() == [[2, 1, 3], [0, 2, 1]]
    with pytest.raises(IndexError):
        pairs.prompt(2)
    many = tiny_pairs(9, pairs_per_prompt=2)
    order = [8, 0, 3, 3]
    picked = many.select(order)
    assert [triple(picked, k) for k in range(4)] == [triple(many, i) for i in order]
    assert picked.rows.tolist() == order
    assert len(many.select([])) == 0 and many.select([]).offsets.tolist() == [0]
    assert len(TokenizedPairs.from_lists([], [], [])) == 0


# ---- the same tokens as TRL -----------------------------------------------------------------


def trl_pairs(rows, tokenizer, max_length):
    """What TRL's trainer would make of the rows: its own preparation, then its own collator."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    args: Any = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    prepared = DPOTrainer._prepare_dataset(
        trainer,
        Dataset.from_list(rows),
        tokenizer,
        args,
        "train",
    )
    collate = DataCollatorForPreference(tokenizer.pad_token_id, max_length=max_length)
    result = []
    for example in prepared:
        batch = collate([example])
        ids, mask = batch["input_ids"].numpy(), batch["completion_mask"].numpy().astype(bool)
        real = batch["attention_mask"].numpy().astype(bool)
        prompt = ids[0][real[0] & ~mask[0]].tolist()
        result.append([prompt, ids[0][mask[0]].tolist(), ids[1][mask[1]].tolist()])
    return result


def implicit_text(rows):
    return [{side: r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in rows]


def implicit_chat(rows):
    return [{side: r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in rows]


MERGING = [  # the prompt's last token merges with the first of one response, or of both
    {"prompt": "what runs ca", "chosen": "t sleeps", "rejected": "ll"},
    {"prompt": "the bird ", "chosen": "sings", "rejected": "house falls"},
    {"prompt": "", "chosen": "cat", "rejected": "dog"},
    {"prompt": "the cat</s>", "chosen": "ends itself</s>", "rejected": "does not"},
]


@pytest.mark.parametrize("max_length", [256, 24, None])
@pytest.mark.parametrize(
    "kind", ["explicit", "implicit", "merging", "merging_without_bos", "chat", "implicit_chat"]
)
def test_same_tokens_as_trl(kind, max_length, plain, chat):
    rows = {
        "explicit": tiny_rows(12),
        "implicit": implicit_text(tiny_rows(12)),
        "merging": MERGING,
        "merging_without_bos": [row for row in MERGING if row["prompt"]],
        "chat": tiny_chat_rows(12),
        "implicit_chat": implicit_chat(tiny_chat_rows(12)),
    }[kind]
    tokenizer = chat if "chat" in kind else plain
    if kind == "merging_without_bos":
        tokenizer = tiny_tokenizer(bos=False)
    expected = trl_pairs(copy.deepcopy(rows), tokenizer, max_length)
    if not expected:
        with pytest.raises(DataError, match="none is left"):
            tokenize(rows, tokenizer, max_length)
        return
    pairs, report = tokenize(rows, tokenizer, max_length)
    assert [triple(pairs, i) for i in range(len(pairs))] == expected
    assert report.n_rows == len(rows) and report.n_pairs == len(expected)
    assert report.n_dropped_long_prompt == len(rows) - len(expected)
    assert report.prompt_boundary_moved >= (2 if kind.startswith("merging") else 0)


def test_tokenizers_that_append_eos_or_bring_a_second_bos(plain):
    from tokenizers import processors

    appends = tiny_tokenizer(bos=False)
    appends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    row = {"prompt": "the cat", "chosen": " runs", "rejected": " sleeps"}
    expected, _ = tokenize([row], plain)
    pairs, report = tokenize([row], appends)
    assert triple(pairs) == triple(expected) and report.prompt_boundary_moved == 0
    pairs, report = tokenize([{**row, "prompt": "<s>the cat"}], plain)
    assert triple(pairs) == triple(expected) and report.n_double_bos == 1


# ---- formats --------------------------------------------------------------------------------


def message(role, content):
    return {"role": role, "content": content}


def test_hh_dialogue_splits_at_the_last_shared_assistant(plain):
    talk = "\n\nHuman: where is it?\n\nAssistant: there.\n\nHuman: what?\n\nAssistant:"
    rows = [{"chosen": talk + " The house.", "rejected": talk + " The hut."}]
    pairs, report = tokenize(rows, plain)
    assert report.format == "hh"
    assert texts(pairs, plain) == ("<s>" + talk, " The house.</s>", " The hut.</s>")
    # The plain rule, asked for by name, gives "The h" to the prompt and moves back to the token.
    pairs, report = tokenize(rows, plain, dataset_format="implicit")
    assert texts(pairs, plain)[0].startswith("<s>" + talk) and report.format == "implicit"
    with pytest.raises(DataError, match=r"row 0: .*share no '\\n\\nAssistant:'.*implicit"):
        tokenize([{"chosen": "one", "rejected": "two"}], plain, dataset_format="hh")


def test_stack_exchange_and_orca(plain, chat):
    row = {"qid": 3, "question": "why", "response_j": "because", "response_k": "no", "metadata": 0}
    pairs, report = tokenize([row], plain)
    assert "".join(texts(pairs, plain)[:2]) == "<s>Question: why\n\nAnswer: because</s>"
    assert report.format == "stack_exchange" and report.unused_columns == ("qid", "metadata")

    rows = [
        {"system": "be small", "question": "why?", "chosen": "yes", "rejected": "no"},
        {"system": "", "question": "why?", "chosen": "yes", "rejected": "no"},
        {"system": None, "question": "why?", "chosen": "yes", "rejected": "no"},
    ]
    pairs, report = tokenize(rows, plain)
    assert report.format == "orca"
    assert texts(pairs, plain) == ("<s>be small\n\nwhy?\n\n", "yes</s>", "no</s>")
    assert texts(pairs, plain, 1) == texts(pairs, plain, 2) == ("<s>why?\n\n", "yes</s>", "no</s>")
    pairs, _ = tokenize(rows, chat)
    assert texts(pairs, chat)[0] == (
        "<|im_start|>system\nbe small<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_conversation_is_read_the_same_however_it_is_stored(chat):
    """Eight ways to store one three-turn preference."""
    prompt = [message("user", "what"), message("assistant", "cat"), message("user", "where")]
    good, bad = [message("assistant", "the house")], [message("assistant", "the tree")]
    explicit = {"prompt": prompt, "chosen": good, "rejected": bad}
    share = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "cat"}]
    share.append({"from": "human", "value": "where"})
    good_share, bad_share = (
        {"from": "gpt", "value": "the house"},
        {"from": "gpt", "value": "the tree"},
    )
    whole = {"chosen": prompt + good, "rejected": prompt + bad}
    stored = {
        "explicit": explicit,
        "implicit": whole,
        "string prompt repeated": {**whole, "prompt": "what", "prompt_id": "7"},
        "prompt messages repeated": {**whole, "prompt": prompt},
        "text responses": {"prompt": prompt, "chosen": "the house", "rejected": "the tree"},
        "sharegpt": {"conversations": share, "chosen": good_share, "rejected": bad_share},
        "sharegpt text": {"conversations": share, "chosen": "the house", "rejected": "the tree"},
        "helpsteer": {
            "context": prompt,
            "response1": "the tree",
            "response2": "the house",
            "overall_preference": 2,
        },
    }
    expected = trl_pairs([copy.deepcopy(explicit)], chat, 256)[0]
    for how, row in stored.items():
        pairs, report = tokenize([row], chat)
        assert triple(pairs) == expected, how
        assert report.n_repeats_prompt == ("repeated" in how), how
    assert "the house<|im_end|>\n" == texts(pairs, chat)[1]


def test_string_prompt_with_assistant_answers(chat):
    row = {
        "prompt": "where",
        "chosen": [message("assistant", "house")],
        "rejected": [message("assistant", "tree")],
    }
    pairs, _ = tokenize([row], chat)
    assert texts(pairs, chat)[0] == "<|im_start|>user\nwhere<|im_end|>\n<|im_start|>assistant\n"
    row["chosen"] = [message("user", "something else"), *row["chosen"]]
    row["rejected"] = [message("user", "something else"), *row["rejected"]]
    with pytest.raises(DataError, match="row 0: 'prompt' is text that the conversations .* repeat"):
        tokenize([row], chat)


def test_conversations_where_one_continues_the_other(chat):
    turns = [message("user", "what"), message("assistant", "cat")]
    longer = [*turns, message("user", "where"), message("assistant", "house")]
    pairs, _ = tokenize([{"chosen": turns, "rejected": longer}], chat)
    prompt, chosen, rejected = texts(pairs, chat)
    assert prompt.endswith("assistant\n") and chosen == "cat<|im_end|>\n"
    assert rejected.startswith("cat<|im_end|>\n<|im_start|>user\nwhere")


def test_tools_and_template_arguments_reach_the_template():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ tools[0]['name'] if tools else '' }}{{ mood }}" + CHATML
    row = tiny_chat_rows(1)[0]
    row |= {"tools": json.dumps([{"name": "tree"}]), "chat_template_kwargs": {"mood": "blue"}}
    pairs, report = tokenize([row], tokenizer)
    assert texts(pairs, tokenizer)[0].startswith("treeblue<|im_start|>user")
    assert report.unused_columns == ()


def test_helpsteer_ties_are_dropped_and_counted(chat):
    base = {"context": [message("user", "what")], "response1": "cat", "response2": "dog"}
    rows = [{**base, "overall_preference": p} for p in (-3, 0, 1)]
    pairs, report = tokenize(rows, chat)
    assert [texts(pairs, chat, i)[1] for i in (0, 1)] == ["cat<|im_end|>\n", "dog<|im_end|>\n"]
    assert report.n_dropped_tie == 1 and pairs.rows.tolist() == [0, 2]
    assert any("1 ties" in line for line in report.lines())


def test_tokenized_columns_are_used_as_they_are(plain):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": np.array([9])}
    pairs, report = tokenize([row, row], None, max_length=4)
    assert triple(pairs) == [[5, 6], [7, 8], [9]] and report.format == "tokenized"
    assert report.n_truncated_chosen == 2 and report.n_truncated_rejected == 0
    with pytest.raises(DataError, match=r"row 1: 'chosen_ids' holds 400; .*\[0, 400\)"):
        tokenize([row, {**row, "chosen_ids": [400]}], plain)
    with pytest.raises(DataError, match="row 0: 'chosen_ids' is not a list of token ids"):
        tokenize([{**row, "chosen_ids": ["a"]}], plain)
    with pytest.raises(DataError, match=r"row 0 \(.*'rejected_ids' has no token to score"):
        tokenize([{**row, "rejected_ids": []}], plain)


def test_generation_prompt_that_the_conversation_drops(chat):
    """As Gemma's empty thought block: the response begins where the two renderings diverge."""
    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = chat.chat_template.replace(
        "assistant\n{% endif %}", "assistant\nslowly {% endif %}"
    )
    rows = tiny_chat_rows(6)
    pairs, report = tokenize(rows, tokenizer)
    expected, _ = tokenize(rows, chat)
    assert [triple(pairs, i) for i in range(6)] == [triple(expected, i) for i in range(6)]
    assert report.prompt_boundary_moved == 6
    assert any("in 6 pairs the response begins before" in line for line in report.lines())


def test_a_template_without_eos_is_reported(chat):
    tokenizer = copy.deepcopy(chat)
    tokenizer.eos_token = "</s>"
    _, report = tokenize(tiny_chat_rows(3), tokenizer)
    assert report.n_without_eos == 6
    assert any("do not end with EOS" in line for line in report.lines())


# ---- bad rows -------------------------------------------------------------------------------

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


# ---- at size --------------------------------------------------------------------------------


def test_processes_give_what_one_process_gives(plain):
    rows = [{**row, "chosen": f"{row['chosen']} {i}"} for i, row in enumerate(tiny_rows(2500))]
    one, report = tokenize(rows, plain, num_proc=1)
    two, report_two = tokenize(rows, plain, num_proc=2)
    assert report == report_two and np.array_equal(one.ids, two.ids)
    assert np.array_equal(one.offsets, two.offsets) and np.array_equal(one.rows, two.rows)
    rows[2300] = {**rows[2300], "chosen": ""}
    rows[10] = {**rows[10], "chosen": ""}
    for num_proc in (1, 2):
        with pytest.raises(DataError, match=r"row 10 .*\(2 such rows\)"):
            tokenize(rows, plain, num_proc=num_proc)
    rows[1500] = {**rows[1500], "chosen": 5}
    with pytest.raises(DataError, match="train dataset, row 1500: 'chosen' is of type int"):
        tokenize(rows, plain, num_proc=2)


@pytest.mark.skipif(not HH.is_file(), reason="the HH pairs are not beside the repository")
def test_the_real_hh_pairs(plain):
    dataset = load_dataset_split(HH)
    assert len(dataset) == 2312
    with pytest.raises(DataError, match=r"'chosen' is empty \(4 such rows\); on_bad_row=drop"):
        tokenize(dataset, plain, None)
    pairs, report = tokenize(dataset, plain, 512, on_bad_row="drop")
    assert report.format == "hh" and report.n_dropped_empty == 4
    assert len(pairs) == 2312 - 4 - report.n_dropped_long_prompt
    assert (pairs.lengths[:, 1:].sum(1) > 1).all()
    assert (pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1)).max() <= 512
    for i in range(0, len(pairs), 97):
        row = dataset[int(pairs.rows[i])]
        prompt, chosen, rejected = texts(pairs, plain, i)
        assert prompt.startswith("<s>\n\nHuman:") and prompt.endswith("\n\nAssistant:")
        assert (prompt + chosen)[3:].startswith(row["chosen"][: len(prompt) - 3])
        for side, response in (("chosen", chosen), ("rejected", rejected)):
            whole = prompt[3:] + response
            assert whole == row[side] + "</s>" or row[side].startswith(whole.rstrip("�"))
    lines = report.lines()
    assert lines[0].startswith("train data: 2,312 rows -> ") and "format hh" in lines[0]
    assert any(line.strip().startswith("row ") and "Assistant:' | ' " in line for line in lines)


# ---- files ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet_and_apart(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


def test_data_needs_no_datasets_package_for_lists():
    """`datasets` is imported by load_dataset_split alone."""
    import subprocess
    import sys

    code = (
        "import sys; import fastdpo.data; "
        "assert 'datasets' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
