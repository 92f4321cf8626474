"""From a row of somebody's dataset to (prompt, chosen, rejected): which columns, which shape.
A row of unpaired data has its one response as both.

Knows column names and dialogue conventions; knows nothing of files, tokens or lengths.
The splitting rules are those of TRL 1.16's `extract_prompt`, less its off-by-one when one text is
the beginning of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, DataError, did_you_mean

Message = dict[str, Any]
Turns = str | list[Message]

FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "tokenized": (("prompt_ids", "chosen_ids", "rejected_ids"), "token ids, used as they are"),
    "explicit": (("prompt", "chosen", "rejected"), "explicit prompt; text or conversations"),
    "implicit": (("chosen", "rejected"), "the prompt is what both begin with"),
    "hh": (("chosen", "rejected"), "Human/Assistant dialogue; the prompt ends with 'Assistant:'"),
    "orca": (("question", "chosen", "rejected"), "question and, where there is one, system"),
    "sharegpt": (("conversations", "chosen", "rejected"), "from/value conversations"),
    "stack_exchange": (("question", "response_j", "response_k"), "j is the better answer"),
    "helpsteer": (
        ("context", "response1", "response2", "overall_preference"),
        "two answers and a preference, negative for the first, 0 for a tie",
    ),
    "unpaired": (
        ("prompt", "completion", "label"),
        "single responses, desirable or not, for kto and apo_zero_unpaired",
    ),
}
"""name -> (columns it must have, one line for people); `auto` picks one of these."""

UNPAIRED = "unpaired"
DATASET_FORMATS = ("auto", *FORMATS)
_OPTIONAL_COLUMNS = {"orca": ("system",), "sharegpt": ("system",)}
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # read with conversations, as TRL does
_HH_HUMAN, _HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class RawPair:
    """One row, understood. Either three strings or three lists of messages.

    problem: None, or (kind, column) with kind `none`, `empty`, `identical` or `tie`; a pair with
    `none` or `tie` has no usable content. repeats_prompt: the responses began with the prompt and
    were cut.
    """

    prompt: Turns = ""
    chosen: Turns = ""
    rejected: Turns = ""
    problem: tuple[str, str] | None = None
    repeats_prompt: bool = False


class _NoneInside(Exception):
    """A message without content; becomes the row's problem."""


def detect_format(name: str, columns: Sequence[str], sample: Sequence[dict]) -> str:
    """Returns the format to use: `name` checked against the columns, or for `auto` the one found.

    sample: the first few rows, to tell Human/Assistant dialogue from other text.
    Raises ConfigError for an unknown name, DataError when the columns do not fit.
    """
    if name not in DATASET_FORMATS:
        raise ConfigError(
            f"dataset_format={name!r} is not known{did_you_mean(name, DATASET_FORMATS)}; "
            f"one of {', '.join(DATASET_FORMATS)}"
        )
    for column in ("image", "images"):
        if column in columns:
            raise DataError(
                f"the dataset has a column {column!r}, and fastdpo trains on text only; remove the "
                "column if the text stands alone"
            )
    if name != "auto":
        missing = [c for c in FORMATS[name][0] if c not in columns]
        if missing:
            raise DataError(
                f"dataset_format={name!r} needs {_listed(FORMATS[name][0])}; "
                f"{_listed(missing)} not among the columns {_listed(columns)}"
                f"{did_you_mean(missing[0], columns)}"
            )
        return name
    has = set(columns).issuperset
    if has(FORMATS["tokenized"][0]):
        return "tokenized"
    for candidate in ("explicit", "orca", "sharegpt", "stack_exchange", "helpsteer", UNPAIRED):
        if has(FORMATS[candidate][0]):
            return candidate
    if has(FORMATS["implicit"][0]):
        texts = [row.get(side) for row in sample for side in ("chosen", "rejected")]
        texts = [text for text in texts if isinstance(text, str)]
        dialogue = texts and all(_HH_HUMAN in t and _HH_ASSISTANT in t for t in texts)
        return "hh" if dialogue else "implicit"
    near = [
        f"; for {column!r}{did_you_mean(column, names)[1:]}"
        for names in [tuple({"prompt", "chosen", "rejected"} - set(columns))]
        for column in columns
        if did_you_mean(column, names)
    ]
    known = "; ".join(f"{key}: {', '.join(cols)}" for key, (cols, _) in FORMATS.items())
    raise DataError(
        f"no preference format fits the columns {_listed(columns)}{near[0] if near else ''}. "
        f"Rename them to prompt, chosen, rejected, or to those of another format ({known})"
    )


def used_columns(format_name: str) -> set[str]:
    """The columns that the format reads where they exist."""
    chat = () if format_name in ("tokenized", "hh", "stack_exchange") else _TEMPLATE_COLUMNS
    return {*FORMATS[format_name][0], *_OPTIONAL_COLUMNS.get(format_name, ()), *chat}


def read_row(row: dict, format_name: str, *, has_chat_template: bool) -> RawPair:
    """Understands one row of a text or conversation format (not `tokenized`).

    Raises DataError, without the row's number, where a value has an impossible type or shape.
    """
    for column in FORMATS[format_name][0]:
        if row.get(column) is None:
            return RawPair(problem=("none", column))
    try:
        pair = _READERS[format_name](row, has_chat_template)
    except _NoneInside as error:
        return RawPair(problem=("none", str(error)))
    if pair.problem:
        return pair
    if format_name == UNPAIRED:
        return _with_problem(pair, ("empty", "completion")) if _is_blank(pair.chosen) else pair
    sides = response_columns(row, format_name)
    if pair.chosen == pair.rejected:
        return _with_problem(pair, ("identical", f"{sides[0]} and {sides[1]}"))
    for side, value in zip(sides, (pair.chosen, pair.rejected), strict=True):
        if _is_blank(value):
            return _with_problem(pair, ("empty", side))
    return pair


def response_columns(row: dict, format_name: str) -> tuple[str, str]:
    """The columns that hold the chosen and the rejected response of `row`."""
    if format_name == "tokenized":
        return "chosen_ids", "rejected_ids"
    if format_name == "stack_exchange":
        return "response_j", "response_k"
    if format_name == "helpsteer":
        first_is_better = float(row["overall_preference"]) < 0
        return ("response1", "response2") if first_is_better else ("response2", "response1")
    if format_name == UNPAIRED:
        return "completion", "completion"
    return "chosen", "rejected"


def _with_problem(pair: RawPair, problem: tuple[str, str]) -> RawPair:
    return RawPair(pair.prompt, pair.chosen, pair.rejected, problem, pair.repeats_prompt)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names)


def _is_blank(value: Turns) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not any(_has_content(message) for message in value)


def _has_content(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(
        message.get("tool_calls")
    )


def _turns(value: Any, column: str) -> Turns:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):  # ShareGPT stores a lone message without its list
        value = [value]
    if not isinstance(value, list):
        raise DataError(
            f"{column!r} is of type {type(value).__name__}; expected text or a list of messages"
        )
    return [_message(item, column) for item in value]


def _message(item: Any, column: str) -> Message:
    if not isinstance(item, dict) or not ({"role", "from"} & item.keys()):
        raise DataError(f"{column!r} holds {str(item)[:60]!r}; a message needs role and content")
    message = {k: v for k, v in item.items() if v is not None and k not in ("from", "value")}
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if role is None or (content is None and not message.get("tool_calls")):
        raise _NoneInside(column)
    message["role"] = _ROLES.get(role, role) if "from" in item else role
    message["content"] = content
    return message


def _assistant(value: Turns) -> list[Message]:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _text(row: dict, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column!r} is of type {type(value).__name__}; expected text")
    return value


def common_text_length(a: str, b: str) -> int:
    """Characters that `a` and `b` begin with in common, by bisection over C-speed compares."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split_text(chosen: str, rejected: str) -> RawPair:
    k = common_text_length(chosen, rejected)
    if chosen == rejected:
        k -= 1  # TRL's rule; the pair is reported as identical
    elif 0 < k < min(len(chosen), len(rejected)) and chosen[k - 1] == " ":
        k -= 1  # the space belongs to the word that follows it, as tokenizers see it
    k = max(k, 0)
    return RawPair(chosen[:k], chosen[k:], rejected[k:])


def _split_turns(chosen: list[Message], rejected: list[Message]) -> RawPair:
    # At least one message stays a response, also where one conversation continues the other.
    longest = max(min(len(chosen), len(rejected)) - 1, 0)
    k = 0
    while k < longest and chosen[k] == rejected[k]:
        k += 1
    return RawPair(chosen[:k], chosen[k:], rejected[k:])


def _read_implicit(row: dict, has_chat_template: bool) -> RawPair:
    chosen, rejected = _turns(row["chosen"], "chosen"), _turns(row["rejected"], "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_text(chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_turns(chosen, rejected)
    raise DataError("'chosen' and 'rejected' must both be text or both be conversations")


def _read_hh(row: dict, has_chat_template: bool) -> RawPair:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    shared = chosen[: common_text_length(chosen, rejected)]
    k = shared.rfind(_HH_ASSISTANT)
    if k < 0:
        raise DataError(
            f"'chosen' and 'rejected' share no {_HH_ASSISTANT!r}; name another dataset_format, "
            "such as implicit"
        )
    k += len(_HH_ASSISTANT)
    return RawPair(chosen[:k], chosen[k:], rejected[k:])


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _join(prompt: Turns, chosen: Turns, rejected: Turns) -> RawPair:
    """An explicit prompt and its responses, whatever mixture of text and conversations."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("'chosen' and 'rejected' must both be text or both be conversations")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return RawPair(prompt, chosen, rejected)
        return RawPair(prompt, _assistant(chosen), _assistant(rejected))
    assert isinstance(chosen, list) and isinstance(rejected, list)
    if isinstance(prompt, str):
        # Only assistants answering: the string is the question. Otherwise the conversations tell
        # the whole story, and repeat the prompt (as in ultrafeedback_binarized).
        if all(m["role"] in ("assistant", "tool") for m in chosen + rejected):
            return RawPair([{"role": "user", "content": prompt}], chosen, rejected)
        pair = _split_turns(chosen, rejected)
        asked = [m["content"] for m in pair.prompt if isinstance(m, dict) and m["role"] == "user"]
        texts = [_squeezed(a) for a in asked if isinstance(a, str)]
        wanted = _squeezed(prompt)
        if wanted and not any(wanted in text or text in wanted for text in texts if text):
            raise DataError(
                "'prompt' is text that the conversations in 'chosen' and 'rejected' do not repeat; "
                "remove one of the two, or make 'prompt' a list of messages"
            )
        return RawPair(pair.prompt, pair.chosen, pair.rejected, repeats_prompt=True)
    n = len(prompt)
    if n and chosen[:n] == prompt and rejected[:n] == prompt:
        return RawPair(prompt, chosen[n:], rejected[n:], repeats_prompt=True)
    return RawPair(prompt, chosen, rejected)


def _read_explicit(row: dict, has_chat_template: bool) -> RawPair:
    return _join(*(_turns(row[c], c) for c in ("prompt", "chosen", "rejected")))


def _system(row: dict) -> str:
    return _text(row, "system").strip() if row.get("system") is not None else ""


def _read_orca(row: dict, has_chat_template: bool) -> RawPair:
    # Roles where the tokenizer knows how to write them; otherwise plain paragraphs.
    system, question = _system(row), _text(row, "question")
    chosen, rejected = _turns(row["chosen"], "chosen"), _turns(row["rejected"], "rejected")
    if not has_chat_template and isinstance(chosen, str):
        return _join(
            f"{system}\n\n{question}\n\n" if system else f"{question}\n\n", chosen, rejected
        )
    prompt = [{"role": "system", "content": system}] if system else []
    return _join([*prompt, {"role": "user", "content": question}], chosen, rejected)


def _read_sharegpt(row: dict, has_chat_template: bool) -> RawPair:
    prompt = _turns(row["conversations"], "conversations")
    if isinstance(prompt, str):
        raise DataError("'conversations' is text; expected a list of messages")
    if (system := _system(row)) and not any(m["role"] == "system" for m in prompt):
        prompt = [{"role": "system", "content": system}, *prompt]
    responses = (_assistant(_turns(row[c], c)) for c in ("chosen", "rejected"))
    return _join(prompt, *responses)


def _read_stack_exchange(row: dict, has_chat_template: bool) -> RawPair:
    prompt = f"Question: {_text(row, 'question')}\n\nAnswer: "
    return RawPair(prompt, _text(row, "response_j"), _text(row, "response_k"))


def _read_helpsteer(row: dict, has_chat_template: bool) -> RawPair:
    try:
        preference = float(row["overall_preference"])
    except (TypeError, ValueError):
        raise DataError(
            f"'overall_preference' is {row['overall_preference']!r}; expected a number"
        ) from None
    if preference == 0:
        return RawPair(problem=("tie", "overall_preference"))
    better, worse = response_columns(row, "helpsteer")
    prompt = _turns(row["context"], "context")
    return _join(prompt, _turns(row[better], better), _turns(row[worse], worse))


def _read_unpaired(row: dict, has_chat_template: bool) -> RawPair:
    """Both sides hold the one response; data_pairs.py puts another into the second's place."""
    completion = _turns(row["completion"], "completion")
    return _join(_turns(row["prompt"], "prompt"), completion, completion)


_READERS = {
    "explicit": _read_explicit,
    "implicit": _read_implicit,
    "hh": _read_hh,
    "orca": _read_orca,
    "sharegpt": _read_sharegpt,
    "stack_exchange": _read_stack_exchange,
    "helpsteer": _read_helpsteer,
    UNPAIRED: _read_unpaired,
}
