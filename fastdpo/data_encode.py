"""From understood rows to token ids: templates, EOS, the boundary, truncation.

What a row means is data_formats.py's business; what to do about bad rows is data.py's.
The token sequences equal those of TRL 1.16 (`DPOTrainer._prepare_dataset` and its collator):
prompt, prompt + chosen and prompt + rejected are tokenized as wholes, and the responses begin where
the tokenized prompt stops being the beginning of both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .data_formats import UNPAIRED, Message, RawPair, read_row, response_columns
from .errors import DataError


@dataclass(frozen=True)
class Problem:
    """A row that cannot, or perhaps should not, be trained on.

    kind: `none`, `empty`, `identical`, `identical_cut` (only after truncation), `unscored` (no
    token whose log-prob could be taken) or `tie`.
    """

    row: int
    kind: str
    column: str


@dataclass(frozen=True)
class EncodePlan:
    """What every row of a dataset is encoded with.

    fatal, dropped: the kinds of problem that end the run, and those that leave the row out.
    cut: responses to max_length; else (unpaired examples) they are only counted, and cut later.
    scan_only: look for problems and tokenize nothing.
    """

    tokenizer: Any
    format_name: str
    max_length: int | None
    fatal: frozenset[str]
    dropped: frozenset[str]
    cut: bool = True
    scan_only: bool = False


@dataclass
class Encoded:
    """Some rows' pairs: ids flat int32, lengths [m, 3] int64, rows [m] int64."""

    ids: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    longest_prompt: int = 0


def encode_rows(rows: Sequence[dict], first_row: int, plan: EncodePlan) -> Encoded:
    """Encodes rows `first_row`, `first_row + 1`, ... of the dataset.

    With a fatal problem among them, it reads on to count the others but tokenizes nothing.
    Raises DataError naming the row for a value of the wrong type or a template's refusal.
    """
    problems: list[Problem] = []
    pairs: list[tuple[int, RawPair]] = []
    if plan.format_name == "tokenized":
        return _encode_tokenized(rows, first_row, plan)
    has_template = bool(getattr(plan.tokenizer, "chat_template", None))
    for i, row in enumerate(rows, start=first_row):
        try:
            pair = read_row(row, plan.format_name, has_chat_template=has_template)
        except DataError as error:
            raise DataError(f"row {i}: {error}") from None
        if pair.problem:
            problems.append(Problem(i, *pair.problem))
            if pair.problem[0] in plan.dropped:
                continue
        pairs.append((i, pair))
    if plan.scan_only or any(p.kind in plan.fatal for p in problems):
        return _collect([], problems, Counter(), rows, first_row, plan)
    counts: Counter[str] = Counter(repeats_prompt=sum(p.repeats_prompt for _, p in pairs))
    prompts, chosens, rejecteds = _tokenize(pairs, rows, first_row, plan, counts)
    triples = []
    known = {p.row for p in problems}
    for (i, _), prompt, chosen, rejected in zip(pairs, prompts, chosens, rejecteds, strict=True):
        k = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
        counts["boundary_moved"] += k < len(prompt)
        triples.append((i, i in known, prompt[:k], chosen[k:], rejected[k:]))
    return _collect(triples, problems, counts, rows, first_row, plan)


def _encode_tokenized(rows: Sequence[dict], first_row: int, plan: EncodePlan) -> Encoded:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    size = len(plan.tokenizer) if plan.tokenizer is not None else np.iinfo(np.int32).max
    problems, triples = [], []
    for i, row in enumerate(rows, start=first_row):
        missing = next((name for name in names if row.get(name) is None), None)
        if missing:
            problems.append(Problem(i, "none", missing))
            continue
        parts = []
        for name in names:
            ids = np.asarray(row[name])
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise DataError(f"row {i}: {name!r} is not a list of token ids")
            if ids.size and not 0 <= ids.min() <= ids.max() < size:
                bad = ids[(ids < 0) | (ids >= size)][0]
                raise DataError(f"row {i}: {name!r} holds {bad}; token ids lie in [0, {size})")
            parts.append(ids.astype(np.int32).tolist())
        triples.append((i, False, *parts))
    return _collect(triples, problems, Counter(), rows, first_row, plan)


def _collect(
    triples: list[tuple[int, bool, list[int], list[int], list[int]]],
    problems: list[Problem],
    counts: Counter[str],
    rows: Sequence[dict],
    first_row: int,
    plan: EncodePlan,
) -> Encoded:
    """Cuts to max_length, looks at what is left, and lays it out flat."""
    flat: list[int] = []
    lengths: list[tuple[int, int, int]] = []
    kept: list[int] = []
    longest = 0
    for i, known, prompt, chosen, rejected in triples:
        longest = max(longest, len(prompt))
        cut = False
        if plan.max_length is not None:
            room = plan.max_length - len(prompt)
            if room <= 0:
                counts["long_prompt"] += 1
                continue
            counts["truncated_chosen"] += len(chosen) > room
            counts["truncated_rejected"] += len(rejected) > room
            if plan.cut:
                cut = max(len(chosen), len(rejected)) > room
                chosen, rejected = chosen[:room], rejected[:room]
        # Without a prompt no row predicts a response's first token.
        unscorable = 0 if prompt else 1
        if min(len(chosen), len(rejected)) <= unscorable:
            sides = response_columns(rows[i - first_row], plan.format_name)
            problem = Problem(i, "unscored", sides[len(chosen) > unscorable])
        elif chosen == rejected and not known and plan.format_name != UNPAIRED:
            sides = response_columns(rows[i - first_row], plan.format_name)
            problem = Problem(i, "identical_cut" if cut else "identical", " and ".join(sides))
        else:
            problem = None
        if problem:
            problems.append(problem)
            if problem.kind in plan.dropped:
                continue
        counts["empty_prompt"] += not prompt
        flat += prompt
        flat += chosen
        flat += rejected
        lengths.append((len(prompt), len(chosen), len(rejected)))
        kept.append(i)
    return Encoded(
        ids=np.array(flat, dtype=np.int32),
        lengths=np.array(lengths, dtype=np.int64).reshape(-1, 3),
        rows=np.array(kept, dtype=np.int64),
        problems=problems,
        counts=counts,
        longest_prompt=longest,
    )


def _common_prefix(prompt: list[int], full: list[int]) -> int:
    if full[: len(prompt)] == prompt:
        return len(prompt)
    return next(k for k, token in enumerate(prompt) if k >= len(full) or full[k] != token)


def _tokenize(
    pairs: list[tuple[int, RawPair]],
    rows: Sequence[dict],
    first_row: int,
    plan: EncodePlan,
    counts: Counter[str],
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Token ids of prompt, prompt + chosen and prompt + rejected, for text and conversations."""
    plain, plain_at = [], []
    chat, chat_at, without_prompt = [], [], []
    for at, (i, pair) in enumerate(pairs):
        if isinstance(pair.prompt, str):
            plain += _plain_texts(pair, plan.tokenizer)
            plain_at.append(at)
        else:
            if not pair.prompt:
                without_prompt.append(at)
            chat += _chat_texts(pair, rows[i - first_row], i, plan.tokenizer)
            chat_at.append(at)
    result: list[list[list[int]]] = [[[]] * len(pairs) for _ in range(3)]
    for ids, places in (
        (_encode_plain(plain, plan.tokenizer, counts), plain_at),
        (_encode(chat, plan.tokenizer, add_special_tokens=False), chat_at),
    ):
        for part in range(3):
            for at, sequence in zip(places, ids[part::3], strict=True):
                result[part][at] = sequence
    prompts, chosens, rejecteds = result
    bos = plan.tokenizer.bos_token_id
    for at in without_prompt:
        begins = chosens[at][:1] == rejecteds[at][:1] == [bos]
        prompts[at] = [bos] if begins else []
    eos = plan.tokenizer.eos_token_id
    sides = (chosens,) if plan.format_name == UNPAIRED else (chosens, rejecteds)
    counts["without_eos"] += sum(eos not in ids[-4:] for part in sides for ids in part)
    return prompts, chosens, rejecteds


def _plain_texts(pair: RawPair, tokenizer: Any) -> tuple[str, str, str]:
    eos = tokenizer.eos_token
    if not eos:
        raise DataError("the tokenizer has no EOS token to end a response with; set its eos_token")
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    assert isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
    chosen, rejected = (t if t.endswith(eos) else t + eos for t in (chosen, rejected))
    return prompt, prompt + chosen, prompt + rejected


def _chat_texts(pair: RawPair, row: dict, i: int, tokenizer: Any) -> tuple[str, str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"row {i}: conversations need a chat template, and this tokenizer has none; use the "
            "tokenizer of an instruction-tuned model, set tokenizer.chat_template, or give text"
        )
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
    tools = row.get("tools")
    kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    return (
        _render(prompt, i, tokenizer, add_generation_prompt=True, **kwargs) if prompt else "",
        _render(prompt + chosen, i, tokenizer, **kwargs),
        _render(prompt + rejected, i, tokenizer, **kwargs),
    )


def _render(messages: list[Message], i: int, tokenizer: Any, **kwargs: Any) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"row {i}: the chat template cannot write this conversation "
            f"({', '.join(str(m.get('role')) for m in messages)}): {' '.join(str(error).split())}"
        ) from error


def _encode(texts: list[str], tokenizer: Any, *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    unique = list(dict.fromkeys(texts))  # prompts recur
    ids = tokenizer(
        unique,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    by_text = dict(zip(unique, ids, strict=True))
    return [by_text[text] for text in texts]


def _encode_plain(texts: list[str], tokenizer: Any, counts: Counter[str]) -> list[list[int]]:
    """As `_encode`, with BOS once and EOS once, whatever tokenizer and text both add."""
    result = _encode(texts, tokenizer, add_special_tokens=True)
    if not texts:
        return result
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer("a")["input_ids"][-1:] == [eos]:  # it appends EOS; the texts carry their own
        result = [ids[:-1] for ids in result]
    if bos is not None:
        doubled = [ids[:2] == [bos, bos] for ids in result]
        counts["double_bos"] += sum(doubled[1::3])
        result = [ids[1:] if twice else ids for ids, twice in zip(result, doubled, strict=True)]
    return result
