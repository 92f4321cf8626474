"""What a run minimises: losses mixed, weighted and fed as the options say, and its derivative with
respect to every token's log-prob.

An `Objective` builds no graph through the model: it answers `token_grad`, where the model's own
backward begins. So a loss that needs the whole step is computed once from all its packs' log-probs
and each pack is run again with its gradient. The losses themselves are in losses.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdpo_kernels import TokenStats, preference_loss

from .batch import Pack
from .config import DPOConfig
from .data_pairs import TokenizedPairs, without_mismatches
from .errors import ConfigError
from .loss_specs import PLAIN_NLL, check_loss_options, needs_reference
from .losses import OPTIONS, PairLogps, call, f_scores, kl_baseline
from .pair_logps import PairSums, pair_sums, token_gradient
from .users_losses import load_losses

FUSED = ("sigmoid", "ipo", "hinge")


@dataclass(frozen=True)
class ScoredPack:
    """A pack with its log-probs: `token_logps` and `ref_token_logps` [N], no graph; the
    reference's are None where the objective reads none."""

    pack: Pack
    token_logps: Tensor
    ref_token_logps: Tensor | None
    stats: TokenStats | None = None


@dataclass(frozen=True)
class PackLoss:
    """All [P], fp32 (fp64 for fp64 log-probs), no graph, but `token_grad`.

    losses: their sum over the packs of a step, divided by its pairs, is the loss. rewards:
    beta * log policy / reference; without a reference beta times the policy's log-prob (per token
    where the loss takes means). logps: summed over a response, under LD-DPO with its weights.
    token_grad [N]: d sum of the step's losses / d token_logps; None if not asked for.
    kl: the step's KL baseline, for each of the pairs; None if the loss has none.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    token_grad: Tensor | None
    kl: Tensor | None = None


class Objective:
    """Raises `ConfigError` for losses and options that do not go together."""

    def __init__(self, args: DPOConfig):
        self.args = args
        self.losses = load_losses(args.loss_type)
        specs = {name: loss.spec for name, loss in self.losses.items()}
        check_loss_options(args, dict(specs))
        self.loss_weights = args.loss_weights or [1.0] * len(specs)
        self.needs_reference = needs_reference(specs)
        self.needs_whole_step = any(spec.scope == "step" for spec in specs.values())
        if self.needs_whole_step and args.world_size > 1:
            raise ConfigError(
                f"loss_type {', '.join(specs)} needs all pairs of a step on one rank, and there "
                f"are {args.world_size}; train on one, with a larger gradient_accumulation_steps"
            )
        self.stats = ("log_sum_sq_probs",) if args.use_weighting else ()
        self.unpaired = any(spec.unpaired for spec in specs.values())
        self.has_kl = self.unpaired and self.needs_whole_step
        if self.has_kl and args.pairs_per_step < 2:
            raise ConfigError(
                f"loss_type {', '.join(specs)} compares with mismatched responses of the same "
                "step, and a step has 1 example; raise per_device_train_batch_size"
            )
        self.columns = number_columns(args) + (("label",) if self.unpaired else ())
        self.means = any(not spec.logps for spec in specs.values())  # rewards of mean log-probs
        self.means = self.means and "cpo" not in specs
        extras = (
            args.use_weighting,
            args.ld_alpha is not None,
            args.f_divergence_type != "reverse_kl",
            args.rpo_alpha,
            args.loss_weights is not None,
            self.columns,
        )
        self.fused = args.loss_type[0] in FUSED and len(specs) == 1 and not any(extras)

    @property
    def mismatch_block(self) -> int | None:
        """For unpaired data: among how many neighbours mismatched responses are exchanged, so many
        as a step has; 1 where the loss reads none. None for pairs."""
        if not self.unpaired:
            return None
        return self.args.pairs_per_step if self.has_kl else 1

    def trained_pairs(self, pairs: TokenizedPairs) -> TokenizedPairs | None:
        """The pairs without mismatched responses, which have no gradient. None where every response
        has one, and where a dropout must fall alike in both passes, so over the same packs."""
        return without_mismatches(pairs) if self.has_kl and self.args.disable_dropout else None

    def __call__(
        self,
        scored: Sequence[ScoredPack],
        mean_chosen_length: float,
        *,
        grad: bool,
        trained: Sequence[Pack] | None = None,
    ) -> list[PackLoss]:
        """The losses of `scored`, which are all packs of the step if `needs_whole_step`.

        mean_chosen_length: scored tokens of the chosen responses, a mean over the step's pairs.
        trained: packs of the same pairs that hold the responses which have a gradient; token_grad
            is then of their tokens. For losses that need the whole step.
        """
        if self.fused:
            return [self._fused(one, grad) for one in scored]
        if not self.needs_whole_step:
            return [
                self._of_pack(one, *self._of_pairs(self._sums(one), mean_chosen_length, grad))
                for one in scored
            ]
        sums = [self._sums(one) for one in scored]
        # In the order of the dataset, so that ties between pairs fall alike however packed.
        order = np.argsort(np.concatenate([one.pack.pair_ids for one in scored]), kind="stable")
        device = scored[0].token_logps.device
        places, back = (_on(device, of) for of in (order, np.argsort(order)))
        whole = self._of_pairs(_concatenate(sums, places), mean_chosen_length, grad)
        sizes = [len(one.lengths) for one in sums]
        parts = [(None,) * len(sums) if x is None else x[back].split(sizes) for x in whole]
        return [
            self._of_pack(one, *of_pack, pack=pack)
            for one, of_pack, pack in zip(
                scored,
                zip(*parts, strict=True),
                trained or [one.pack for one in scored],
                strict=True,
            )
        ]

    def _of_pack(
        self,
        scored: ScoredPack,
        losses: Tensor,
        rewards: Tensor,
        logps: Tensor,
        slopes: Tensor | None,
        kl: Tensor | None,
        pack: Pack | None = None,
    ) -> PackLoss:
        dtype = scored.token_logps.dtype
        out = torch.promote_types(dtype, torch.float32)
        token_grad = None
        if slopes is not None:
            pack = pack or scored.pack
            token_grad = token_gradient(slopes, pack, len(pack.targets)).to(dtype)
        (chosen_rewards, rejected_rewards), (chosen, rejected) = (
            of.to(out).unbind(1) for of in (rewards, logps)
        )
        return PackLoss(
            losses.to(out), chosen_rewards, rejected_rewards, chosen, rejected, token_grad, kl
        )

    def _fused(self, scored: ScoredPack, grad: bool) -> PackLoss:
        pack = scored.pack
        with torch.set_grad_enabled(grad):
            leaf = scored.token_logps.detach().requires_grad_(grad)
            output = preference_loss(
                leaf,
                pack.cu_responses,
                pack.pairs,
                ref_token_logps=scored.ref_token_logps,
                beta=self.args.beta,
                loss_type=self.args.loss_type[0],
                label_smoothing=self.args.label_smoothing,
            )
            token_grad = torch.autograd.grad(output.losses.sum(), leaf)[0] if grad else None
        logps = output.logps[pack.pairs]  # [P, 2]
        return PackLoss(
            output.losses.detach(),
            output.chosen_rewards,
            output.rejected_rewards,
            logps[:, 0],
            logps[:, 1],
            token_grad,
        )

    def _sums(self, scored: ScoredPack) -> PairSums:
        return pair_sums(
            scored.token_logps,
            scored.ref_token_logps if self.needs_reference else None,
            scored.pack,
            by_length=self.args.ld_alpha is not None,
            log_sum_sq_probs=scored.stats.log_sum_sq_probs
            if self.args.use_weighting and scored.stats is not None
            else None,
        )

    def _of_pairs(
        self, sums: PairSums, mean_chosen_length: float, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """losses [P], rewards [P, 2], logps [P, 2], d sum(losses) / d sums.policy [P, 2, K], and
        the KL baseline [P] if there is one."""
        with torch.set_grad_enabled(grad):
            leaf = sums.policy.detach().requires_grad_(grad)
            logps = self._pair_logps(leaf, sums, mean_chosen_length)
            losses = self._losses(logps, sums)
            slopes = torch.autograd.grad(losses.sum(), leaf)[0] if grad else None
        policy = torch.stack([logps.policy_chosen_logps, logps.policy_rejected_logps], 1).detach()
        if logps.ref_chosen_logps is not None and logps.ref_rejected_logps is not None:
            ratios = policy - torch.stack([logps.ref_chosen_logps, logps.ref_rejected_logps], 1)
        else:
            ratios = policy / sums.lengths.clamp(min=1) if self.means else policy
        kl = kl_baseline(logps).expand(len(policy)) if self.has_kl else None
        return losses.detach(), self.args.beta * ratios, policy, slopes, kl

    def _pair_logps(self, policy: Tensor, sums: PairSums, mean_chosen_length: float) -> PairLogps:
        alpha = 1.0 if self.args.ld_alpha is None else self.args.ld_alpha

        def weighted(parts: Tensor) -> Tensor:  # [P, 2, K] -> [P, 2]
            # LD-DPO, arXiv 2409.06411: alpha weighs the tokens beyond the shared length.
            return parts[..., 0] + alpha * parts[..., 1:].sum(-1)

        chosen, rejected = weighted(policy).unbind(1)
        ref = (None, None) if sums.reference is None else weighted(sums.reference).unbind(1)
        lengths = sums.lengths.clamp(min=1)
        return PairLogps(
            policy_chosen_logps=chosen,
            policy_rejected_logps=rejected,
            ref_chosen_logps=ref[0],
            ref_rejected_logps=ref[1],
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            chosen_nll=-policy[:, 0].sum(-1),
            mean_chosen_length=torch.full_like(lengths[0, 0], max(mean_chosen_length, 1e-300)),
            desirable=sums.columns["label"] if self.unpaired else None,
        )

    def _losses(self, logps: PairLogps, sums: PairSums) -> Tensor:
        """[P]: the weighted sum of the mix, and what applies to all of it."""
        args = self.args
        total = torch.zeros_like(logps.policy_chosen_logps)
        for name, weight in zip(self.losses, self.loss_weights, strict=True):
            fed = logps
            if args.f_divergence_type != "reverse_kl" and name != PLAIN_NLL:
                fed = logps.with_scores(
                    *(
                        f_scores(x, args.f_divergence_type, args.f_alpha_divergence_coef)
                        for x in (logps.chosen_logratios, logps.rejected_logratios)
                    )
                )
            if args.score_margin_scale:
                # -log sigmoid(beta * margin - offset): Llama 2, arXiv 2307.09288 eq. 2, as ODPO
                # (2402.10571) has it for DPO.
                gap = sums.columns["score_chosen"] - sums.columns["score_rejected"]
                offset = args.score_margin_scale * gap / args.beta
                fed = logps.with_scores(logps.chosen_logratios - offset, logps.rejected_logratios)
            losses = self._call(name, fed)
            if args.use_soft_labels:
                p = sums.columns["p_chosen"]
                losses = p * losses + (1 - p) * self._call(name, fed.swapped())
            if sums.weights is not None:
                losses = losses * sums.weights
            total = total + weight * losses
        if args.rpo_alpha:
            # RPO, arXiv 2404.19733 (v3) eq. 1: each chosen response's NLL per token.
            total = total + args.rpo_alpha * logps.chosen_nll / logps.chosen_lengths
        if args.use_pair_weights:
            total = total * sums.columns["weight"]
        return total

    def _call(self, name: str, logps: PairLogps) -> Tensor:
        options = {option: getattr(self.args, option) for option in OPTIONS}
        return call(self.losses[name], logps, options)


def number_columns(args: DPOConfig) -> tuple[str, ...]:
    """The dataset's columns that the options ask for."""
    wanted = ("weight",) if args.use_pair_weights else ()
    wanted += ("p_chosen",) if args.use_soft_labels else ()
    return wanted + (("score_chosen", "score_rejected") if args.score_margin_scale else ())


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _concatenate(sums: Sequence[PairSums], places: Tensor) -> PairSums:
    """The pairs of all packs, in the order of `places`."""
    first = sums[0]
    reference = None
    if first.reference is not None:
        reference = torch.cat([s.reference for s in sums if s.reference is not None])[places]
    weights = None
    if first.weights is not None:
        weights = torch.cat([s.weights for s in sums if s.weights is not None])[places]
    return PairSums(
        policy=torch.cat([s.policy for s in sums])[places],
        reference=reference,
        lengths=torch.cat([s.lengths for s in sums])[places],
        weights=weights,
        columns={
            name: torch.cat([s.columns[name] for s in sums])[places] for name in first.columns
        },
    )
