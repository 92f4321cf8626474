"""The one name space of all options: what a given name stands for, and what to say of a wrong one.

An option is declared with its class (script_arguments.py, model_config.py, training_options.py);
here its older names and aliases become today's. The standard library alone: see options.py.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

from .errors import ConfigError, did_you_mean
from .options import Bound, Option, check, describe
from .unsupported import ALIASES, RENAMED, TRL_NEUTRAL, is_neutral, unsupported

Params = ParamSpec("Params")
Result = TypeVar("Result")


def settle(owner: type, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments `given` under the names of `owner`'s fields. Raises `ConfigError` for
    a name that nothing knows, and for an option of TRL's that asks for what fastdpo does not do.
    """
    known = {f.name for f in fields(owner)}
    given = dict(given)
    for alias, name in ALIASES.items():
        value = given.pop(alias, None)
        if value is not None and given.setdefault(name, value) != value:
            raise ConfigError(
                f"{alias!r} and {name!r} are one option with two values: {value!r} and "
                f"{given[name]!r}; give one of them"
            )
    if (ratio := given.pop("warmup_ratio", None)) is not None:
        _settle_warmup(given, ratio)
    for name in [name for name in given if name not in known]:
        if name not in TRL_NEUTRAL:
            raise unknown(name, owner)
        if not is_neutral(given[name], TRL_NEUTRAL[name]):
            raise unsupported(name, given[name])
        del given[name]
    return given


def overridden(values: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """`values`, and `by` in the place of those of the same option, whatever name it has there.
    None under a second name says nothing, as in `settle`."""
    names = {**ALIASES, "warmup_ratio": "warmup_steps"}

    def one_name(name: str) -> str:
        return names.get(name, name)

    said = {one_name(name) for name, value in by.items() if value is not None or name not in names}
    return {name: value for name, value in values.items() if one_name(name) not in said} | by


def _settle_warmup(given: dict[str, Any], ratio: Any) -> None:
    share = check(Option("warmup_ratio", (float,), False, Bound(at_least=0, below=1)), ratio)
    if share and given.get("warmup_steps"):
        raise ConfigError(
            f"'warmup_ratio' {share:g} and 'warmup_steps' {given['warmup_steps']!r} are both set; "
            "give one of them (warmup_steps below 1 is a share of all steps)"
        )
    if share:
        given["warmup_steps"] = share


def unknown(name: str, owner: type | None = None) -> ConfigError:
    """The error for an option that `owner` does not have, with its present or the nearest name.
    Without `owner`: that none of the three classes has.
    """
    homes = [cls.__name__ for cls in _declaring_classes() if name in describe(cls)]
    if owner is not None and homes:
        home = "DPOConfig" if homes[0] == "TrainingOptions" else homes[0]  # as users know it
        return ConfigError(f"{name!r} is an option of {home}, not of {owner.__name__}")
    if name in RENAMED:
        return ConfigError(f"unknown option {name!r}; its name is {RENAMED[name]}")
    nearest = did_you_mean(name, options_by_name(owner))
    return ConfigError(f"unknown option {name!r}{nearest or '; see `fastdpo train --help`'}")


def checked_arguments(init: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorates an `__init__`: a keyword that it does not have is a `ConfigError` that says whose
    it is (older releases of TRL took `beta` and `tokenizer` beside the model)."""
    names = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: Params.args, **given: Params.kwargs) -> Result:
        for name in given:
            if name not in names:
                raise unknown(name, type(args[0]))
        return init(*args, **given)

    return checked


def options_by_name(owner: type | None = None) -> dict[str, Option]:
    """All options of the command line's one name space, or those that `owner` has."""
    result: dict[str, Option] = {}
    for cls in _declaring_classes():
        if owner is None or issubclass(owner, cls):
            result |= {name: opt for name, opt in describe(cls).items() if name not in result}
    return result


def _declaring_classes() -> tuple[type, ...]:
    """In the order of the help. Imported here because they are built with `settle`."""
    from .model_config import ModelConfig
    from .script_arguments import ScriptArguments
    from .training_options import TrainingOptions

    return ModelConfig, ScriptArguments, TrainingOptions
