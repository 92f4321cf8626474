"""From rows to TokenizedPairs: what is stored, and the same tokens as TRL, at any size."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastdpo.data import TokenizedPairs, load_dataset_split
from fastdpo.errors import DataError
from tests.tiny import (
    texts,
    tiny_chat_rows,
    tiny_pairs,
    tiny_rows,
    tiny_tokenizer,
    tokenize,
    triple,
)

HH = Path(__file__).parents[1] / "../shared/data/hh-rlhf/harmless-base-test.jsonl.gz"


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


def implicit(rows):
    return [{side: r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in rows]


MERGING = [  # the prompt's last token merges with the first of one response, or of both
    {"prompt": "what runs ca", "chosen": "t sleeps", "rejected": "ll"},
    {"prompt": "the bird ", "chosen": "sings", "rejected": "house falls"},
    {"prompt": "", "chosen": "cat", "rejected": "dog"},
    {"prompt": "the cat</s>", "chosen": "ends itself</s>", "rejected": "does not"},
]


@pytest.mark.usefixtures("datasets_apart")
@pytest.mark.parametrize("max_length", [256, 24, None])
@pytest.mark.parametrize(
    "kind", ["explicit", "implicit", "merging", "merging_without_bos", "chat", "implicit_chat"]
)
def test_same_tokens_as_trl(kind, max_length, plain, chat):
    rows = {
        "explicit": tiny_rows(12),
        "implicit": implicit(tiny_rows(12)),
        "merging": MERGING,
        "merging_without_bos": [row for row in MERGING if row["prompt"]],
        "chat": tiny_chat_rows(12),
        "implicit_chat": implicit(tiny_chat_rows(12)),
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


@pytest.mark.usefixtures("datasets_apart")
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


def test_data_needs_no_datasets_package_for_lists():
    """`datasets` is imported by load_dataset_split alone."""
    import subprocess
    import sys

    code = (
        "import sys; import fastdpo.data; "
        "assert 'datasets' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
