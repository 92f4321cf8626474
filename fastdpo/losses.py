"""Preference losses: small pure functions of the log-probs of pairs, registered by name.

A loss takes `PairLogps` and floats and returns losses [P]; which options it takes and what it may
be combined with stands in loss_specs.py, under the same name. How losses are mixed, weighted and
brought back to tokens is objective.py's work. sigmoid, hinge and ipo without extras run fused
(fastdpo_kernels.preference_loss).
"""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, did_you_mean
from .loss_specs import SPECS, LossSpec


@dataclass(frozen=True)
class PairLogps:
    """What a loss sees of P pairs. All [P], in nat, but `mean_chosen_length`.

    policy_*_logps, ref_*_logps: summed over a response's scored tokens, under LD-DPO with its
        weights. The reference's are None where no loss of the run reads a reference.
    *_lengths: scored tokens, at least 1. chosen_nll: minus the policy's summed log-prob of chosen,
        every token with weight 1.
    desirable: 1 or 0, the labels of unpaired data; None for pairs. Chosen is then an example's one
        response, whatever its label, and rejected a mismatched response to its prompt.
    mean_chosen_length []: over all pairs of the step, however it is packed: the mean over pairs
        of `chosen_nll / mean_chosen_length` is the step's NLL per token.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor | None
    ref_rejected_logps: Tensor | None
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    chosen_nll: Tensor
    mean_chosen_length: Tensor
    desirable: Tensor | None = None

    @property
    def chosen_logratios(self) -> Tensor:
        """log policy / reference of the chosen responses."""
        assert self.ref_chosen_logps is not None, "no loss of this run reads a reference"
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log policy / reference of the rejected responses."""
        assert self.ref_rejected_logps is not None, "no loss of this run reads a reference"
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def margins(self) -> Tensor:
        """chosen_logratios - rejected_logratios."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def chosen_nll_per_token(self) -> Tensor:
        """Each pair's share of the step's NLL per token."""
        return self.chosen_nll / self.mean_chosen_length

    def with_scores(self, chosen: Tensor, rejected: Tensor) -> "PairLogps":
        """The same pairs with other scores in the place of their log-ratios."""
        zeros = torch.zeros_like(chosen)
        return replace(
            self,
            policy_chosen_logps=chosen,
            policy_rejected_logps=rejected,
            ref_chosen_logps=zeros,
            ref_rejected_logps=zeros,
        )

    def swapped(self) -> "PairLogps":
        """The same pairs, the other response preferred; what concerns the NLL stays."""
        return replace(
            self,
            policy_chosen_logps=self.policy_rejected_logps,
            policy_rejected_logps=self.policy_chosen_logps,
            ref_chosen_logps=self.ref_rejected_logps,
            ref_rejected_logps=self.ref_chosen_logps,
            chosen_lengths=self.rejected_lengths,
            rejected_lengths=self.chosen_lengths,
        )


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss: `fn(logps, *, beta, ...) -> losses [P]`, and what it is defined for."""

    fn: Callable[..., Tensor]
    spec: LossSpec


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin), the label flipped with probability `label_smoothing`."""
    right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def sigmoid(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    return _smoothed(beta * logps.margins, label_smoothing)


def hinge(logps: PairLogps, *, beta: float) -> Tensor:
    return torch.relu(1 - beta * logps.margins)


def ipo(logps: PairLogps, *, beta: float) -> Tensor:
    """Log-ratios per token, as the authors computed them; beta is the paper's tau."""
    chosen = logps.chosen_logratios / logps.chosen_lengths
    rejected = logps.rejected_logratios / logps.rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(softmax of the two rewards || [1 - label_smoothing, label_smoothing])."""
    margins = beta * logps.margins
    right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
    return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (
        wrong - math.log(label_smoothing)
    )


def nca_pair(logps: PairLogps, *, beta: float) -> Tensor:
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    noise = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * noise


def robust(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """Unbiased under labels flipped with probability `label_smoothing`."""
    margins = beta * logps.margins
    right, wrong = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def bco_pair(logps: PairLogps, *, beta: float) -> Tensor:
    return -F.logsigmoid(beta * logps.chosen_logratios) - F.logsigmoid(
        -beta * logps.rejected_logratios
    )


def sppo_hard(logps: PairLogps, *, beta: float) -> Tensor:
    """beta is the paper's 1 / eta."""
    goal = 0.5 / beta
    return (logps.chosen_logratios - goal) ** 2 + (logps.rejected_logratios + goal) ** 2


def aot(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compares the sorted margins of policy and reference; losses by rank, not by pair."""
    assert logps.ref_chosen_logps is not None and logps.ref_rejected_logps is not None
    policy = (logps.policy_chosen_logps - logps.policy_rejected_logps).sort(stable=True).values
    reference = (logps.ref_chosen_logps - logps.ref_rejected_logps).sort(stable=True).values
    return _smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compares the sorted log-ratios of chosen and rejected; losses by rank, not by pair."""
    chosen = logps.chosen_logratios.sort(stable=True).values
    rejected = logps.rejected_logratios.sort(stable=True).values
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero(logps: PairLogps, *, beta: float) -> Tensor:
    """For chosen responses that are better than what the model writes."""
    return torch.sigmoid(-beta * logps.chosen_logratios) + torch.sigmoid(
        beta * logps.rejected_logratios
    )


def apo_down(logps: PairLogps, *, beta: float) -> Tensor:
    """For chosen responses that are worse than what the model writes."""
    return torch.sigmoid(beta * logps.chosen_logratios) + torch.sigmoid(-beta * logps.margins)


def discopop(logps: PairLogps, *, beta: float, discopop_tau: float) -> Tensor:
    margins = beta * logps.margins
    share = torch.sigmoid(margins / discopop_tau)
    return (1 - share) * -F.logsigmoid(margins) + share * torch.exp(-margins)


def sft(logps: PairLogps, *, beta: float) -> Tensor:
    return logps.chosen_nll_per_token


def sigmoid_norm(logps: PairLogps, *, beta: float) -> Tensor:
    chosen = logps.chosen_logratios / logps.chosen_lengths
    rejected = logps.rejected_logratios / logps.rejected_lengths
    return -F.logsigmoid(beta * (chosen - rejected))


def simpo(
    logps: PairLogps, *, beta: float, simpo_gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    chosen = logps.policy_chosen_logps / logps.chosen_lengths
    rejected = logps.policy_rejected_logps / logps.rejected_lengths
    return _smoothed(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def cpo(logps: PairLogps, *, beta: float, cpo_alpha: float, label_smoothing: float = 0.0) -> Tensor:
    """With the NLL per token of the step, as TRL has it."""
    margins = beta * (logps.policy_chosen_logps - logps.policy_rejected_logps)
    return _smoothed(margins, label_smoothing) + cpo_alpha * logps.chosen_nll_per_token


def orpo(logps: PairLogps, *, beta: float) -> Tensor:
    """beta is the paper's lambda. Odds of the mean log-probs; the NLL is the step's per token."""
    chosen = _log_odds(logps.policy_chosen_logps / logps.chosen_lengths)
    rejected = _log_odds(logps.policy_rejected_logps / logps.rejected_lengths)
    return logps.chosen_nll_per_token - beta * F.logsigmoid(chosen - rejected)


def kl_baseline(logps: PairLogps) -> Tensor:
    """KTO's z_0 []: the mean log-ratio of the step's mismatched responses, at least 0, constant.

    TRL takes it from each micro-batch, so the two agree where a step is one of those.
    """
    return logps.rejected_logratios.detach().mean().clamp(min=0)


def kto(
    logps: PairLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """lambda_y - v(x, y): how far a response's log-ratio is from the right side of the baseline."""
    surplus = beta * (logps.chosen_logratios - kl_baseline(logps))
    return _by_label(logps, surplus, desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    logps: PairLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """kto with a baseline of 0: apo_zero's terms, each for responses of its label."""
    surplus = beta * logps.chosen_logratios
    return _by_label(logps, surplus, desirable_weight, undesirable_weight)


def _by_label(logps: PairLogps, surplus: Tensor, desirable: float, undesirable: float) -> Tensor:
    """desirable * sigmoid(-surplus) or, by label, undesirable * sigmoid(surplus)."""
    assert logps.desirable is not None
    sign = 2 * logps.desirable - 1
    weight = desirable * logps.desirable + undesirable * (1 - logps.desirable)
    return weight * torch.sigmoid(-sign * surplus)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) for p < 1; a p that rounds to 1 counts as the largest number below."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired),
    *(apo_zero, apo_down, discopop, sft, sigmoid_norm, simpo, cpo, orpo),
    *(kto, apo_zero_unpaired),
)
REGISTRY: dict[str, PreferenceLoss] = {
    fn.__name__: PreferenceLoss(fn, SPECS[fn.__name__]) for fn in _FUNCTIONS
}


# ---- f-divergences ---------------------------------------------------------------------------


def f_scores(logratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(u) of u = exp(logratios), which replaces log u in the margin (f-DPO, arXiv 2309.16240),
    up to constants that a difference cancels.

    alpha_divergence: f'(u) = (u^(alpha - 1) - 1) / (alpha - 1), the exponent held below 80 as TRL
    does; alpha 1 is reverse_kl.
    """
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return logratios
    if divergence == "forward_kl":
        return -torch.expm1(-logratios)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    assert divergence == "alpha_divergence"
    return torch.expm1(((alpha - 1) * logratios).clamp(max=80.0)) / (alpha - 1)


# ---- losses by name --------------------------------------------------------------------------


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


OPTIONS = (
    *("beta", "label_smoothing", "discopop_tau", "simpo_gamma", "cpo_alpha"),
    *("desirable_weight", "undesirable_weight"),
)


def _parameters(name: str, fn: Callable) -> tuple[str, ...]:
    """Which of the loss options a user's function takes."""
    first, *others = inspect.signature(fn).parameters.values()
    for parameter in others:
        given = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if parameter.default is parameter.empty and (not given or parameter.name not in OPTIONS):
            raise ConfigError(
                f"loss_type {name!r} wants {parameter.name!r}; a loss is called as "
                f"fn({first.name}, beta=…), and may take {', '.join(OPTIONS[1:])} too; give "
                "anything else a default"
            )
    return tuple(p.name for p in others if p.name in OPTIONS[1:])


def call(loss: PreferenceLoss, logps: PairLogps, options: dict[str, float]) -> Tensor:
    """The losses [P] under those of `options` that the function takes."""
    taken = inspect.signature(loss.fn).parameters
    return loss.fn(logps, **{name: value for name, value in options.items() if name in taken})


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
