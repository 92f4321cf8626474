"""One option: its type, domain, choices, default and help; and the check that every value passes.

Options are fields of plain dataclasses (script_arguments.py, model_config.py,
training_options.py); here is what reads them. The standard library alone, so that a misspelt flag
is answered before torch is imported. No option is declared here.
"""

import functools
import json
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Annotated, Any, TypeVar

from .errors import ConfigError, did_you_mean

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
NONE = ("none", "null", "")
UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Bound:
    """The domain of a number, in its annotation: `beta: Annotated[float, Bound(above=0)]`."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def holds(self, value: Any) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        signs = ((">", self.above), (">=", self.at_least), ("<", self.below), ("<=", self.at_most))
        return " and ".join(f"{sign} {limit}" for sign, limit in signs if limit is not None)


@dataclass(frozen=True)
class Words:
    """What a number or a switch takes beside that: `Count | Annotated[str, Words(("auto",))]`."""

    words: tuple[str, ...]


AUTO = "auto"
Auto = Annotated[str, Words((AUTO,))]
Positive = Annotated[float, Bound(above=0)]
NonNegative = Annotated[float, Bound(at_least=0)]
Share = Annotated[float, Bound(at_least=0, below=1)]
Count = Annotated[int, Bound(at_least=1)]
Natural = Annotated[int, Bound(at_least=0)]


def option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """A dataclass field; its metadata are those that transformers' HfArgumentParser reads."""
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """What `describe` reads off one field. `kinds`: the accepted types, without None."""

    name: str
    kinds: tuple[type, ...]
    nullable: bool = False
    bound: Bound | None = None
    choices: tuple[str, ...] | None = None
    default: Any = None
    help: str = ""
    item: type = str  # of a list
    words: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """`a number > 0`, `one of a, b or none`, …, for messages and for --help."""
        if self.choices and self.kinds != (list,):
            text = f"one of {', '.join(self.choices)}"
        else:
            words = {**_WORDS, list: "a list of numbers" if self.item is float else _WORDS[list]}
            kinds = [kind for kind in self.kinds if kind is not str or not self.words]
            text = " or ".join(words[kind] for kind in kinds)
            text += f" {self.bound}" if self.bound else ""
            text = " or ".join([text, *self.words])
        return f"{text} or none" if self.nullable else text


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list of names",
    dict: "a mapping (JSON on the command line)",
}


@functools.cache
def describe(cls: type) -> Mapping[str, Option]:
    """The options that `cls` itself declares, in order, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    own = cls.__dict__.get("__annotations__", {})
    return {f.name: _describe(f, hints[f.name]) for f in fields(cls) if f.name in own}


def _describe(f: Field, hint: Any) -> Option:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    bound, words, kinds, item = None, (), [], str
    for part in typing.get_args(hint) if is_union else (hint,):
        if typing.get_origin(part) is Annotated:
            part, domain = typing.get_args(part)
            bound = domain if isinstance(domain, Bound) else bound
            words = domain.words if isinstance(domain, Words) else words
        if typing.get_origin(part) is list:
            (item,) = typing.get_args(part)
        kinds.append(typing.get_origin(part) or part)
    if dict in kinds and str in kinds:  # as transformers annotates them: text is the mapping's JSON
        kinds.remove(str)
    return Option(
        name=f.name,
        kinds=tuple(kind for kind in kinds if kind is not type(None)),
        nullable=type(None) in kinds,
        bound=bound,
        choices=tuple(f.metadata["choices"]) if "choices" in f.metadata else None,
        default=default_of(f),
        help=f.metadata["help"],
        item=item,
        words=words,
    )


def default_of(f: Field) -> Any:
    """The default of a dataclass field, None where it has none."""
    if f.default_factory is not MISSING:
        return f.default_factory()
    return None if f.default is MISSING else f.default


def check(opt: Option, value: Any) -> Any:
    """`value` as the option's type. Text becomes a number, a boolean, a list or a mapping where
    the option is one (YAML 1.1 reads `1e-6` as text). Raises `ConfigError`.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or (opt.nullable and str not in opt.kinds and _is_none_word(value)):
        if opt.nullable:
            return None
        raise _refusal(opt, value)
    for kind in opt.kinds:
        converted = _CONVERT[kind](value)
        if kind is list and opt.item is float:
            converted = _to_numbers(value)
        if converted is not None:
            break
    else:
        raise _refusal(opt, value)
    if opt.words and isinstance(converted, str):
        if converted not in opt.words:
            raise ConfigError(f"{_refusal(opt, value)}{did_you_mean(converted, opt.words)}")
        return converted
    if opt.choices is not None:
        for item in converted if isinstance(converted, list) else [converted]:
            if item not in opt.choices:
                raise ConfigError(
                    f"{opt.name!r} expects one of {', '.join(opt.choices)}; got {item!r}"
                    f"{did_you_mean(str(item), opt.choices)}"
                )
    if opt.bound is not None and not opt.bound.holds(converted):
        raise _refusal(opt, value)
    return converted


def parse_bytes(text: str, option: str = "gpu_memory") -> int:
    """`24GiB`, `24 GB`, `512MiB` as bytes. Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if size <= 0:
        raise ConfigError(f"{option!r} expects a size such as 24GiB, 24GB or 512MiB, got {text!r}")
    return size


def _refusal(opt: Option, value: Any) -> ConfigError:
    return ConfigError(f"{opt.name!r} expects {opt.expected}, got {value!r}")


def _is_none_word(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in NONE


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, str) and value.strip().lower() in TRUE + FALSE:
        return value.strip().lower() in TRUE
    return value if isinstance(value, bool) else None


def _to_int(value: Any) -> int | None:
    number = _to_float(value)
    return int(number) if number is not None and number == int(number) else None


def _to_float(value: Any) -> int | float | None:
    """A finite number; an int stays one, so that logging_steps=10 is not 10.0."""
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__float__")):
        return None
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        pass
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _to_str(value: Any) -> str | None:
    return os.fspath(value) if isinstance(value, str | os.PathLike) else None


def _to_list(value: Any) -> list[str] | None:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
        return None
    return sorted(value) if isinstance(value, set) else list(value)


def _to_numbers(value: Any) -> list[float] | None:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        return None
    numbers = [_to_float(item) for item in value]
    return None if None in numbers else [float(n) for n in numbers if n is not None]


def _to_dict(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return dict(value) if isinstance(value, Mapping) else None


_CONVERT: dict[type, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    list: _to_list,
    dict: _to_dict,
}


def check_fields(config: Any, cls: type) -> None:
    """Checks, and converts in place, every option of `config` that `cls` declares."""
    for name, opt in describe(cls).items():
        setattr(config, name, check(opt, getattr(config, name)))


Class = TypeVar("Class", bound=type)


def checked_init(settle: Callable[[type, dict[str, Any]], dict[str, Any]]):
    """Decorates a dataclass whose keyword arguments first go through `settle(cls, given)`: a
    misspelt one is then a `ConfigError` with the nearest name, not a `TypeError`.
    """

    def decorate(cls: Class) -> Class:
        generated = cls.__init__

        @functools.wraps(generated)
        def __init__(self: Any, *args: Any, **given: Any) -> None:
            generated(self, *args, **settle(cls, given))

        cls.__init__ = __init__
        return cls

    return decorate
