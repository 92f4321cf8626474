"""Real text for tests: HH dialogues where they are at hand, else the pairs of `fastdpo demo`."""

import functools
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from benchmarks import hh
from fastdpo.demo import ASSETS


def dialogues(folder: Path = hh.DATA) -> list[dict[str, str]]:
    """Rows of plain text: prompt, chosen, rejected, in HH's form.

    folder: where the HH file may be. The demo's conversations are shorter: some 100 characters.
    """
    try:
        return hh.explicit_rows(hh.read_pairs(folder))
    except FileNotFoundError:
        return demo_dialogues()


@functools.cache
def demo_dialogues() -> list[dict[str, str]]:
    """The demo's training pairs, written out as HH writes dialogues; neighbours set apart, whose
    answers resemble each other."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    rows = []
    for line in (ASSETS / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = "".join(names[turn["role"]] + turn["content"] for turn in row["prompt"])
        chosen, rejected = (f" {row[side][0]['content']}" for side in ("chosen", "rejected"))
        rows.append({"prompt": f"{turns}\n\nAssistant:", "chosen": chosen, "rejected": rejected})
    return [row for start in range(7) for row in rows[start::7]]


def tokenizer_of(rows: list[dict[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the rows, without a BOS token."""
    return hh.train_tokenizer((text for row in rows for text in row.values()), vocab_size)
