"""Preference losses: small pure functions of the log-probs of pairs, registered by name.

A loss takes `PairLogps` and floats and returns losses [P]. Its docstring cites paper and equation;
which options it takes and what it may be combined with stands in loss_specs.py, under the same
name. s is the logistic function, w and l are chosen and rejected, r = beta * log-ratio. How losses
are mixed, weighted and brought back to tokens is objective.py's work; a user's own are found by
users_losses.py. sigmoid, hinge and ipo without extras run fused (fastdpo_kernels.preference_loss).
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    right = F.logsigmoid(margins)
    if not label_smoothing:  # 0 times the other would not be 0 at an infinite margin
        return -right
    return -(1 - label_smoothing) * right - label_smoothing * F.logsigmoid(-margins)


def sigmoid(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(r_w - r_l): DPO, arXiv 2305.18290 eq. 7. With label smoothing e it is cDPO (Mitchell,
    2023) eq. 3: -(1 - e) log s(r_w - r_l) - e log s(r_l - r_w)."""
    return _smoothed(beta * logps.margins, label_smoothing)


def hinge(logps: PairLogps, *, beta: float) -> Tensor:
    """max(0, 1 - (r_w - r_l)): RSO, arXiv 2309.06657 eq. 12, the hinge of SLiC-HF, 2305.10425, on
    DPO's margin."""
    return torch.relu(1 - beta * logps.margins)


def ipo(logps: PairLogps, *, beta: float) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17; beta is the paper's tau, and log-ratios are means per token, as
    the authors computed them."""
    chosen = logps.chosen_logratios / logps.chosen_lengths
    rejected = logps.rejected_logratios / logps.rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(softmax(r_w, r_l) || (1 - label_smoothing, label_smoothing)): EXO, arXiv 2402.00856
    eq. 16."""
    margins = beta * logps.margins
    right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
    return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (
        wrong - math.log(label_smoothing)
    )


def nca_pair(logps: PairLogps, *, beta: float) -> Tensor:
    """-log s(r_w) - log s(-r_w) / 2 - log s(-r_l) / 2: NCA, arXiv 2402.05369 (v3) table 1."""
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    noise = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * noise


def robust(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e) with DPO's L(w, l) = -log s(r_w - r_l): the
    unbiased loss of rDPO, arXiv 2403.00409, under labels flipped with probability e,
    `label_smoothing`."""
    margins = beta * logps.margins
    right, wrong = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def bco_pair(logps: PairLogps, *, beta: float) -> Tensor:
    """-log s(r_w) - log s(-r_l): BCO, arXiv 2404.04656 (ACL 2025) eq. 6, which has no reward shift;
    that of eq. 8 is a moving average."""
    return -F.logsigmoid(beta * logps.chosen_logratios) - F.logsigmoid(
        -beta * logps.rejected_logratios
    )


def sppo_hard(logps: PairLogps, *, beta: float) -> Tensor:
    """SPPO, arXiv 2405.00675 eq. 4.7, the winner's P 1 and the loser's 0; beta is 1 / eta."""
    goal = 0.5 / beta
    return (logps.chosen_logratios - goal) ** 2 + (logps.rejected_logratios + goal) ** 2


def aot(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, arXiv 2406.05882 (v1) eq. 11 by algorithm 2. By rank i, not by pair: h(u_(i) - v_(i))
    with h(x) = log(1 + exp(-beta x)), u the sorted margins log p(chosen) - log p(rejected) of the
    policy, v those of the reference."""
    assert logps.ref_chosen_logps is not None and logps.ref_rejected_logps is not None
    policy = (logps.policy_chosen_logps - logps.policy_rejected_logps).sort(stable=True).values
    reference = (logps.ref_chosen_logps - logps.ref_rejected_logps).sort(stable=True).values
    return _smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """As aot, arXiv 2406.05882 (v1) eq. 11, but by algorithm 1: u are the sorted log-ratios of the
    chosen responses, v those of the rejected."""
    chosen = logps.chosen_logratios.sort(stable=True).values
    rejected = logps.rejected_logratios.sort(stable=True).values
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero(logps: PairLogps, *, beta: float) -> Tensor:
    """s(-r_w) + s(r_l): APO, arXiv 2408.06266 eq. 7, for chosen responses that are better than what
    the model writes."""
    return torch.sigmoid(-beta * logps.chosen_logratios) + torch.sigmoid(
        beta * logps.rejected_logratios
    )


def apo_down(logps: PairLogps, *, beta: float) -> Tensor:
    """s(r_w) + s(-(r_w - r_l)): APO, arXiv 2408.06266 eq. 8, for chosen responses that are worse
    than what the model writes."""
    return torch.sigmoid(beta * logps.chosen_logratios) + torch.sigmoid(-beta * logps.margins)


def discopop(logps: PairLogps, *, beta: float, discopop_tau: float) -> Tensor:
    """(1 - s(x / tau)) * -log s(x) + s(x / tau) * exp(-x), x = r_w - r_l: DiscoPOP, arXiv
    2406.08414 eq. 5."""
    margins = beta * logps.margins
    # One exponential: a share of 0 times exp(-margins) = inf would be no number.
    exponential = torch.exp(F.logsigmoid(margins / discopop_tau) - margins)
    return torch.sigmoid(-margins / discopop_tau) * -F.logsigmoid(margins) + exponential


def sft(logps: PairLogps, *, beta: float) -> Tensor:
    """-log p(chosen) / mean length: the chosen responses' NLL, whose mean over the step's pairs is
    that over its tokens. Mixed in as in MPO, arXiv 2411.10442."""
    return logps.chosen_nll_per_token


def sigmoid_norm(logps: PairLogps, *, beta: float) -> Tensor:
    """sigmoid with log-ratios per token: Tulu 3, arXiv 2411.15124 eq. 6."""
    chosen = logps.chosen_logratios / logps.chosen_lengths
    rejected = logps.rejected_logratios / logps.rejected_lengths
    return -F.logsigmoid(beta * (chosen - rejected))


def simpo(
    logps: PairLogps, *, beta: float, simpo_gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """-log s(beta * (difference of the mean log-probs) - simpo_gamma): SimPO, arXiv 2405.14734
    eq. 6."""
    chosen = logps.policy_chosen_logps / logps.chosen_lengths
    rejected = logps.policy_rejected_logps / logps.rejected_lengths
    return _smoothed(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def cpo(logps: PairLogps, *, beta: float, cpo_alpha: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(beta * (log p(w) - log p(l))), CPO, arXiv 2401.08417 eq. 3, and its NLL term: per
    token of the step, as TRL has it."""
    margins = beta * (logps.policy_chosen_logps - logps.policy_rejected_logps)
    return _smoothed(margins, label_smoothing) + cpo_alpha * logps.chosen_nll_per_token


def orpo(logps: PairLogps, *, beta: float) -> Tensor:
    """ORPO, arXiv 2403.07691 eq. 6 and 7; beta is the paper's lambda. Odds of the mean log-probs;
    the NLL is the step's per token."""
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
    """lambda_y - v(x, y), KTO, arXiv 2402.01306 (v4) eq. 8: lambda_y s(beta z_0 - r) for a
    desirable response, lambda_y s(r - beta z_0) for an undesirable one."""
    surplus = beta * (logps.chosen_logratios - kl_baseline(logps))
    return _by_label(logps, surplus, desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    logps: PairLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """kto with a baseline of 0: the two terms of APO, arXiv 2408.06266 eq. 7, each for responses of
    its label."""
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


OPTIONS = (
    *("beta", "label_smoothing", "discopop_tau", "simpo_gamma", "cpo_alpha"),
    *("desirable_weight", "undesirable_weight"),
)


def call(loss: PreferenceLoss, logps: PairLogps, options: dict[str, float]) -> Tensor:
    """The losses [P] under those of `options` that the function takes."""
    taken = inspect.signature(loss.fn).parameters
    return loss.fn(logps, **{name: value for name, value in options.items() if name in taken})


# ---- f-divergences ---------------------------------------------------------------------------


def f_scores(logratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(u) of u = exp(logratios), which replaces log u in the margin (f-DPO, arXiv 2309.16240),
    with the constant that makes f'(1) 0. A difference cancels it, one of means per token (ipo,
    sigmoid_norm) does not.

    alpha_divergence: f'(u) = (u^(alpha - 1) - 1) / (alpha - 1), the exponent held below 80 as TRL
    does; alpha 1 is reverse_kl. forward_kl: f'(u) = 1 - 1 / u, which nothing holds: below a
    log-ratio of -88 (fp64: -709) it is -inf. So is then the loss of such a chosen response, and the
    step is not finite; of a rejected one the loss is 0 where the loss has that limit (sigmoid
    without smoothing, hinge), and so is its gradient.
    """
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return logratios
    if divergence == "forward_kl":
        score = _OneMinusExpNeg.apply(logratios)
        assert isinstance(score, Tensor)
        return score
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    assert divergence == "alpha_divergence"
    return torch.expm1(((alpha - 1) * logratios).clamp(max=80.0)) / (alpha - 1)


class _OneMinusExpNeg(torch.autograd.Function):
    """1 - exp(-x). Where a loss has no slope its gradient is 0, be exp(-x) infinite: the sigmoid
    that made the slope 0 falls faster than any exp(-x) grows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return -torch.expm1(-x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (slope,) = ctx.saved_tensors, grads
        return torch.where(slope == 0, slope, slope * torch.exp(-x))
