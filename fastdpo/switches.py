"""Turning a model to eval mode and another adapter, and back, at the price of setting attributes.

PEFT and torch walk the whole model, by name, several times a switch: milliseconds a step. `Switch`
watches them do it once and then sets what they set. Where they do more than set the attributes
below, it lets them do it every time.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# What torch's eval() and PEFT's switches set: modes, adapters that are off, adapters that are on.
ATTRIBUTES = (
    *("training", "_disable_adapters", "_adapters_disabled"),
    *("_active_adapter", "active_adapter"),
)
_ABSENT = object()


class Switch:
    """The state that `plain`, a context manager, puts `model` into; entered again and again.

    Inside, gradients must be off: which parameters require them is left as it is.
    """

    def __init__(self, model: nn.Module, plain: Callable[[], AbstractContextManager]):
        self.model, self.plain = model, plain
        self._modules: list[nn.Module] = []
        self._wanted: list[tuple[dict[str, Any], str, Any]] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        modules = _modules_of(self.model)
        if modules != self._modules:  # the first time, or a layer came or went
            self._modules, self._wanted = modules, _watch(modules, self.plain)
        if self._wanted is None:
            with self.plain():
                yield
            return
        before = []
        for attributes, name, value in self._wanted:
            was = attributes.get(name, _ABSENT)
            if was is not value:
                before.append((attributes, name, was))
                attributes[name] = value
        try:
            yield
        finally:
            for attributes, name, was in before:
                if was is _ABSENT:
                    del attributes[name]
                else:
                    attributes[name] = was


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module, some of them twice: without names and sets, a tenth of `modules()`."""
    found = [model]
    for module in found:  # which grows
        found.extend(child for child in module._modules.values() if child is not None)
    return found


def _watch(
    modules: list[nn.Module], plain: Callable[[], AbstractContextManager]
) -> list[tuple[dict[str, Any], str, Any]] | None:
    """The attributes inside `plain`; None where it does more than set them."""
    distinct = list(dict.fromkeys(modules))
    before = [_others(module) for module in distinct]
    with plain():
        same = all(
            _same(_others(module), was) for module, was in zip(distinct, before, strict=True)
        )
        wanted = [
            (vars(module), name, vars(module)[name])
            for module in distinct
            for name in ATTRIBUTES
            if name in vars(module)
        ]
    return wanted if same and not any(_acts_on_mode(module) for module in distinct) else None


def _others(module: nn.Module) -> dict[str, Any]:
    own = {f" {name}": child for name, child in module._modules.items()}
    return own | {name: value for name, value in vars(module).items() if name not in ATTRIBUTES}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def _acts_on_mode(module: nn.Module) -> bool:
    """Whether `train()` or `eval()` do more for `module` than setting `training`."""
    if isinstance(module, PreTrainedModel):
        ours = type(module).train is PreTrainedModel.train
        return not ours or bool(getattr(module, "use_kernels", False))
    return type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
