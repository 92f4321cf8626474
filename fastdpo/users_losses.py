"""Losses by name: ours, or a user's own function `module:function`, tried before it is used.

A user's function is called on made-up pairs first: one that fails, or whose gradient would depend
on how a step is packed, is refused before the first step.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import cast

import torch
from torch import Tensor

from .errors import ConfigError, did_you_mean
from .loss_specs import LossSpec
from .losses import OPTIONS, REGISTRY, PairLogps, PreferenceLoss, call


def load_losses(names: Sequence[str]) -> dict[str, PreferenceLoss]:
    """The losses called `names`: ours, or the user's own under `module:function`.

    A plain function is a loss of single pairs that reads the reference; the module may hold a
    `PreferenceLoss` instead, to say otherwise. Raises `ConfigError`.
    """
    return {name: REGISTRY[name] if name in REGISTRY else _load_users(name) for name in names}


def _load_users(name: str) -> PreferenceLoss:
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    adds = here not in sys.path  # a script's folder is on the path anyway, a command's is not
    if adds:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"loss_type {name!r}: can't import {module_name!r}: {error}") from error
    finally:
        if adds:
            sys.path.remove(here)
    found = getattr(module, attribute, None)
    if found is None:
        nearest = did_you_mean(attribute, dir(module))
        raise ConfigError(f"loss_type {name!r}: {module_name!r} has no {attribute!r}{nearest}")
    given = found.fn if isinstance(found, PreferenceLoss) else found
    if not callable(given):
        raise ConfigError(f"loss_type {name!r} is a {type(given).__name__}, not a function")
    fn = cast(Callable[..., Tensor], given)
    parameters = _parameters(name, fn)
    base = found.spec if isinstance(found, PreferenceLoss) else LossSpec(source=name)
    loss = PreferenceLoss(fn, replace(base, parameters=parameters))
    _try(name, loss)
    return loss


def _parameters(name: str, fn: Callable) -> tuple[str, ...]:
    """Which of the loss options a user's function takes."""
    try:
        first, *others = inspect.signature(fn).parameters.values()
    except ValueError as error:  # a builtin shows no signature; a function may take nothing
        raise ConfigError(
            f"loss_type {name!r} is no function of log-probs: a loss is called as "
            "fn(logps, beta=…); wrap it in one"
        ) from error
    for parameter in others:
        given = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if parameter.default is parameter.empty and (not given or parameter.name not in OPTIONS):
            raise ConfigError(
                f"loss_type {name!r} wants {parameter.name!r}; a loss is called as "
                f"fn({first.name}, beta=…), and may take {', '.join(OPTIONS[1:])} too; give "
                "anything else a default"
            )
    return tuple(p.name for p in others if p.name in OPTIONS[1:])


def _try(name: str, loss: PreferenceLoss) -> None:
    """Calls a user's loss on four made-up pairs: its shape, its gradient, and whether a pair's
    loss depends on that pair alone, without which packs would change the gradient."""
    options = {
        "beta": 0.1,
        "label_smoothing": 0.1,
        "discopop_tau": 0.05,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }

    def called(*i: float) -> Tensor:
        pairs = _example(torch.tensor(i, dtype=torch.float64), not loss.spec.reference_free)
        try:
            return call(loss, pairs, options)
        except Exception as error:
            raise ConfigError(
                f"loss_type {name!r} fails on made-up pairs"
                f"{' without a reference' if loss.spec.reference_free else ''}: "
                f"{type(error).__name__}: {error}"
            ) from error

    losses = called(0, 1, 2, 3)
    if not isinstance(losses, Tensor) or losses.shape != (4,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"loss_type {name!r} must return one loss a pair, [P]: of 4 pairs it made {got}; "
            "the mean is taken outside"
        )
    if not losses.requires_grad or losses.dtype != torch.float64:
        raise ConfigError(
            f"loss_type {name!r} must be differentiable and keep the dtype of its inputs: it made "
            f"{losses.dtype} {'with' if losses.requires_grad else 'without'} a gradient"
        )
    if loss.spec.scope == "step":
        return
    alone = torch.cat([called(i) for i in range(4)])
    if not torch.allclose(losses, alone, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ConfigError(
            f"loss_type {name!r} gives a pair another loss in other company, so it needs the whole "
            "step: make it fastdpo.losses.PreferenceLoss(fn, LossSpec(source=…, scope='step'))"
        )


def _example(i: Tensor, with_reference: bool) -> PairLogps:
    logps: dict[str, Tensor] = {
        "policy_chosen_logps": -7 - i,
        "policy_rejected_logps": -5 - (i - 1.5) ** 2,
        "ref_chosen_logps": -6.5 - 0.7 * i,
        "ref_rejected_logps": -6 - 0.3 * i,
        "chosen_lengths": 3 + i,
        "rejected_lengths": 5 - i,
        "chosen_nll": 7 + i,
        "mean_chosen_length": torch.tensor(4.5, dtype=torch.float64),
        "desirable": i % 2,
    }
    assert logps.keys() == {f.name for f in fields(PairLogps)}
    for key in ("policy_chosen_logps", "policy_rejected_logps", "chosen_nll"):
        logps[key].requires_grad_()
    made = PairLogps(**logps)
    if with_reference:
        return made
    return replace(made, ref_chosen_logps=None, ref_rejected_logps=None)
