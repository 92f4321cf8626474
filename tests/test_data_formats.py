"""Every way in which datasets write pairs down is read as the same pairs."""

import copy
import json

import numpy as np
import pytest

from fastdpo.errors import DataError
from tests.test_data import trl_pairs
from tests.tiny import (
    CHATML,
    message,
    texts,
    tiny_chat_rows,
    tiny_tokenizer,
    tokenize,
    triple,
)


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
