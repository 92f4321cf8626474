"""Where the reference's log-probs come from: adapters off, a frozen model, or computed before.

`make_reference` chooses and says why; every kind answers `token_logps(packs)`, one fp32 tensor
[N] a pack, aligned with the pack's targets. Reference forwards never build a graph.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import REFERENCE_ADAPTER, copy_adapter, is_untouched, reference_adapter
from .batch import Pack
from .config import DPOConfig
from .data import TokenizedPairs
from .errors import ConfigError, ModelError
from .model import base_model, disable_dropout, is_quantized
from .steps import Packer

logger = logging.getLogger(__name__)


PackForward = Callable[[nn.Module, Pack], torch.Tensor]  # (model, pack) -> token_logps [N]


class Reference(Protocol):
    """Answers for packs; `equals_initial_policy` says whether step 1 must show margins of 0."""

    name: str
    equals_initial_policy: bool

    def token_logps(self, packs: Sequence[Pack]) -> list[torch.Tensor]: ...


class LiveReference(Reference, Protocol):
    """A reference that asks a model when it is asked."""

    @property
    def model(self) -> nn.Module: ...


@dataclass
class AdapterReference:
    """The policy's own base model, with its adapters off (`adapter` None) or under `adapter`."""

    forward: PackForward
    model: PeftModel
    adapter: str | None
    equals_initial_policy: bool
    name: str = "adapters_off"

    @torch.no_grad()
    def token_logps(self, packs: Sequence[Pack]) -> list[torch.Tensor]:
        with evaluating(self.model), reference_adapter(self.model, self.adapter):
            return [self.forward(self.model, pack) for pack in packs]


@dataclass
class ModelReference:
    """A model: a frozen copy of the initial policy, the user's `ref_model`, or the policy itself
    while it is still untrained (to precompute from)."""

    forward: PackForward
    model: nn.Module
    equals_initial_policy: bool
    name: str = "model"

    @torch.no_grad()
    def token_logps(self, packs: Sequence[Pack]) -> list[torch.Tensor]:
        with evaluating(self.model):
            return [self.forward(self.model, pack) for pack in packs]


class PrecomputedReference:
    """Per-token fp32 log-probs of a whole dataset, held on the host. 4 bytes a response token.

    `logps [total]` holds, pair after pair, the scored tokens of chosen, then of rejected;
    response `2 * pair_id + side` occupies `starts[...] : starts[... + 1]`.
    """

    name = "precompute"

    def __init__(self, pairs: TokenizedPairs, source: Reference):
        lengths = np.diff(pairs.offsets).reshape(-1, 3)  # [n, 3]: prompt, chosen, rejected
        # Behind an empty prompt nothing predicts a response's first token: it is not scored.
        unscored = (lengths[:, :1] == 0) & (lengths[:, 1:] > 0)
        scored = lengths[:, 1:] - unscored
        self.starts = np.concatenate([[0], np.cumsum(scored.reshape(-1))])
        self.logps = np.full(self.starts[-1], np.nan, dtype=np.float32)
        self.equals_initial_policy = source.equals_initial_policy

    def store(self, pack: Pack, token_logps: torch.Tensor) -> None:
        """Keeps `token_logps [N]` of `pack` for every pair in it."""
        values = token_logps.float().cpu().numpy()
        bounds = pack.cu_responses.tolist()
        for pair_id, responses in zip(pack.pair_ids.tolist(), pack.pairs.tolist(), strict=True):
            for side, response in enumerate(responses):
                at = self._at(pair_id, side)
                self.logps[at] = values[bounds[response] : bounds[response + 1]]

    def token_logps(self, packs: Sequence[Pack]) -> list[torch.Tensor]:
        return [self._of_pack(pack) for pack in packs]

    def _of_pack(self, pack: Pack) -> torch.Tensor:
        parts = [self.logps[self._at(pair_id, side)] for pair_id, side in pack.responses]
        values = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        if np.isnan(values).any():
            raise ModelError(
                f"the reference gave no finite log-prob for a response of pairs "
                f"{pack.pair_ids.tolist()}; check the reference model's weights and dtype"
            )
        return torch.from_numpy(values).to(pack.targets.device, non_blocking=True)

    def _at(self, pair_id: int, side: int) -> slice:
        index = 2 * pair_id + side
        return slice(self.starts[index], self.starts[index + 1])


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """`model` in eval mode; gradient checkpointing and dropout do not apply inside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def precompute(
    source: Reference,
    pairs: TokenizedPairs,
    packer: Packer,
    *,
    description: str,
    progress: bool,
) -> PrecomputedReference:
    """Runs `source` over all of `pairs`, forward only, in packs planned from the dataset alone."""
    result = PrecomputedReference(pairs, source)
    with tqdm(total=len(pairs), desc=description, unit="pair", disable=not progress) as bar:
        for pack in packer.packs(pairs, np.arange(len(pairs))):
            (token_logps,) = source.token_logps([pack])
            result.store(pack, token_logps)
            bar.update(len(pack.pair_ids))
    return result


def reference_kind(
    args: DPOConfig, model: PreTrainedModel | PeftModel, ref_model: nn.Module | None
) -> str:
    """Which reference to use: `model`, `adapters_off`, `adapter` or `copy`.

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
    if not isinstance(model, PeftModel):
        if kind == "adapters_off":
            raise ConfigError(
                "reference='adapters_off' needs an adapter, and the model has none; pass "
                "peft_config (--use_peft), or use reference='copy'"
            )
        return "copy"
    if REFERENCE_ADAPTER in model.peft_config and kind in ("auto", "copy"):
        return "adapter"
    if kind == "copy":
        return "adapter"
    if kind == "auto" and not is_untouched(model):
        raise ConfigError(
            "the model carries an adapter that was trained before, so its reference is ambiguous: "
            "set reference='copy' for the adapter as it is now, 'adapters_off' for the bare base "
            f"model, or name a frozen adapter {REFERENCE_ADAPTER!r}"
        )
    return "adapters_off"


def make_reference(
    kind: str,
    *,
    forward: PackForward,
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
    if kind == "adapter":
        fresh = REFERENCE_ADAPTER not in model.peft_config
        if fresh:
            copy_adapter(model)
        return AdapterReference(forward, model, REFERENCE_ADAPTER, fresh, name="adapter 'ref'")
    return AdapterReference(forward, model, None, is_untouched(model))


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
