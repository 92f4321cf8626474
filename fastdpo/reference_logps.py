"""Where the reference's log-probs come from: adapters off, another adapter, a frozen model, none.

`make_reference` makes what `reference_kind` chose; every kind answers `token_logps(packs)`, one
fp32 tensor [N] a pack, aligned with the pack's targets. Reference forwards never build a graph.
Computed ahead and kept on disk: precompute.py. Moved during training: reference_sync.py.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .adapters import (
    REFERENCE_ADAPTER,
    adapter_parameters,
    check_biases,
    copy_adapter,
    is_untouched,
    reference_adapter,
)
from .batch import Pack
from .config import DPOConfig
from .errors import ConfigError, ModelError, did_you_mean
from .model import base_model, disable_dropout, is_quantized
from .switches import Switch

Forward = Callable[[nn.Module, Pack], torch.Tensor]  # (model, pack) -> token_logps [N]


class Reference(Protocol):
    """Answers for packs; `equals_initial_policy` says whether step 1 must show margins of 0."""

    name: str
    equals_initial_policy: bool

    def token_logps(self, packs: Sequence[Pack]) -> Sequence[torch.Tensor | None]: ...


class LiveReference(Reference, Protocol):
    """A reference that asks a model when it is asked, under its `adapters` (none: all off)."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def adapters(self) -> Sequence[str]: ...


@dataclass
class AdapterReference:
    """The policy's own base model, with its adapters off (`adapter` None) or under `adapter`."""

    forward: Forward
    model: PeftModel
    adapter: str | None
    equals_initial_policy: bool
    name: str = "adapters_off"

    def __post_init__(self) -> None:
        self._switched = Switch(self.model, self._plainly_switched)

    @contextlib.contextmanager
    def _plainly_switched(self) -> Iterator[None]:
        with evaluating(self.model), reference_adapter(self.model, self.adapter):
            yield

    @property
    def adapters(self) -> Sequence[str]:
        return () if self.adapter is None else (self.adapter,)

    @torch.no_grad()
    def token_logps(self, packs: Sequence[Pack]) -> list[torch.Tensor]:
        with self._switched():
            return [self.forward(self.model, pack) for pack in packs]


@dataclass
class ModelReference:
    """A model: a frozen copy of the initial policy, the user's `ref_model`, or the policy itself
    while it is still untrained (to precompute from)."""

    forward: Forward
    model: nn.Module
    equals_initial_policy: bool
    name: str = "model"

    def __post_init__(self) -> None:
        self._switched = Switch(self.model, functools.partial(evaluating, self.model))

    @property
    def adapters(self) -> Sequence[str]:
        return self.model.active_adapters if isinstance(self.model, PeftModel) else ()

    @torch.no_grad()
    def token_logps(self, packs: Sequence[Pack]) -> list[torch.Tensor]:
        with self._switched():
            return [self.forward(self.model, pack) for pack in packs]


@dataclass
class NoReference:
    """For losses that read none: answers None. `model` is the policy, which is not asked."""

    model: nn.Module
    equals_initial_policy: bool = False
    name: str = "none"
    adapters: Sequence[str] = ()

    def token_logps(self, packs: Sequence[Pack]) -> list[None]:
        return [None] * len(packs)


def refuse_reference_options(args: DPOConfig, ref_model: object) -> None:
    """Raises `ConfigError` for a reference that was asked for though no loss reads it."""
    asked = {
        "ref_model": ref_model is not None,
        "reference": args.reference != "auto",
        "precompute_ref_log_probs": args.precompute_ref_log_probs,
        "ref_cache_dir": args.ref_cache_dir is not None,
        "sync_ref_model": args.sync_ref_model,
    }
    for option, given in asked.items():
        if given:
            raise ConfigError(
                f"{option!r} is set, and loss_type {', '.join(args.loss_type)} reads no reference; "
                "leave it out"
            )


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """`model` in eval mode; gradient checkpointing and dropout do not apply inside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def reference_kind(
    args: DPOConfig, model: PreTrainedModel | PeftModel, ref_model: nn.Module | None
) -> str:
    """Which reference to use: `model`, `copy`, `adapters_off`, `adapter copy` or `adapter:NAME`.

    Raises `ConfigError` where the options and the models leave more than one reading.
    """
    kind = args.reference
    if ref_model is not None:
        if ref_model is model:
            raise ConfigError(
                "ref_model is the very object passed as model, so it would be trained too; leave "
                "ref_model out and a reference is made for you"
            )
        if kind not in ("auto", "model"):
            raise ConfigError(f"reference={kind!r} and a ref_model: give one of the two")
        return "model"
    if kind == "model":
        raise ConfigError("reference='model' needs a ref_model, and none was given")
    if isinstance(model, PeftModel):
        return _kind_with_adapters(kind, model, args.sync_ref_model)
    if kind not in ("auto", "copy"):
        raise ConfigError(
            f"reference={kind!r} needs an adapter, and the model has none; pass "
            "peft_config (--use_peft), or use reference='copy'"
        )
    return "copy"


def _kind_with_adapters(kind: str, model: PeftModel, moves: bool) -> str:
    if len(model.active_adapters) != 1:
        raise ConfigError(
            f"the model has {len(model.active_adapters)} active adapters "
            f"({', '.join(model.active_adapters)}), and one is trained; choose it with "
            "model.set_adapter(name)"
        )
    (trained,) = model.active_adapters
    others = [name for name in model.peft_config if name != trained]
    named = f"adapter:{REFERENCE_ADAPTER}"
    copies = kind == "copy" or moves  # what moves is a copy
    if kind.startswith("adapter:"):
        return _named_adapter(kind, trained, others)
    if copies and REFERENCE_ADAPTER in others:
        raise ConfigError(
            f"the copy of adapter {trained!r} would be called {REFERENCE_ADAPTER!r}, and the model "
            f"has an adapter of that name; use reference={named!r} (without sync_ref_model) to "
            "take that one, or delete it with model.delete_adapter"
        )
    if kind == "auto" and REFERENCE_ADAPTER in others:
        return named
    if kind == "auto" and not is_untouched(model):
        also = "".join(f", {f'adapter:{name}'!r} for that adapter" for name in others)
        raise ConfigError(
            f"adapter {trained!r} was trained before, so its reference is ambiguous: set "
            "reference='copy' for the adapter as it is now, 'adapters_off' for the bare base "
            f"model{also}"
        )
    return "adapter copy" if copies else "adapters_off"


def _named_adapter(kind: str, trained: str, others: list[str]) -> str:
    name = kind.removeprefix("adapter:")
    if name == trained:
        raise ConfigError(
            f"reference={kind!r} names the adapter that is trained; use reference='copy' for what "
            "it is now"
        )
    if name not in others:
        choices = f"it has {', '.join(others)}" if others else f"it has {trained!r} alone"
        raise ConfigError(
            f"reference={kind!r}: the model has no such adapter besides the trained one; {choices}"
            f"{did_you_mean(name, others)}"
        )
    return kind


def make_reference(
    kind: str,
    *,
    forward: Forward,
    model: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    for_precompute: bool,
) -> LiveReference:
    """The reference of `kind`. To precompute, the untrained policy serves as its own copy."""
    if kind == "model":
        assert ref_model is not None
        check_same_vocabulary(model, ref_model)
        freeze(ref_model)
        return ModelReference(forward, ref_model, equals_initial_policy=False)
    if kind == "copy":
        assert isinstance(model, PreTrainedModel)
        if is_quantized(model):
            raise ModelError(
                "a quantized model without an adapter can't be trained, nor copied as a "
                "reference; pass peft_config (--use_peft)"
            )
        if for_precompute:
            return ModelReference(forward, model, equals_initial_policy=True, name="initial policy")
        frozen = copy.deepcopy(model)
        freeze(frozen)
        return ModelReference(forward, frozen, equals_initial_policy=True, name="copy")
    assert isinstance(model, PeftModel)
    check_biases(model)
    if kind == "adapters_off":
        return AdapterReference(forward, model, None, is_untouched(model))
    if kind == "adapter copy":
        copy_adapter(model)
        return AdapterReference(forward, model, REFERENCE_ADAPTER, True, name="copy of the adapter")
    name = kind.removeprefix("adapter:")
    for _, parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)
    return AdapterReference(forward, model, name, False, name=kind)


def freeze(model: nn.Module) -> None:
    """Eval mode, no dropout, no gradients."""
    model.eval()
    model.requires_grad_(False)
    disable_dropout(model)


def check_same_vocabulary(
    model: PreTrainedModel | PeftModel, ref_model: PreTrainedModel | PeftModel
) -> None:
    """A reference that reads other token ids would give log-probs of other texts."""
    policy_size, ref_size = (
        base_model(m).config.get_text_config().vocab_size for m in (model, ref_model)
    )
    if policy_size != ref_size:
        raise ModelError(
            f"the policy's vocabulary has {policy_size} tokens, ref_model's {ref_size}; both must "
            "share one tokenizer"
        )
