"""The load-balancing loss of mixtures of experts, as padded, unshared training would have it.

Switch Transformers, arXiv 2101.03961, eq. 4-6, as transformers computes it (all layers' tokens in
one mean): E * sum_e f_e * p_e, with f_e the share of tokens that chose expert e (among their top k)
and p_e the mean probability that the router gave it. A product of means is no sum over packs: the
sums here are added up over a step first. A shared prompt's token counts once for each sequence it
stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batch import Pack
from .errors import ConfigError, ModelError
from .model import n_embeddings
from .runtime import sum_over_ranks


@dataclass(frozen=True)
class RouterSums:
    """Sums over tokens (times what they stand for) and layers of one pack, or of a step.

    chosen [E]: how often each expert was among a token's top k; no graph. probs [E]: its routing
    probabilities, with their graph. rows: tokens times layers, one number. fp32 (fp64 for fp64).
    """

    chosen: Tensor
    probs: Tensor
    rows: Tensor


@dataclass(frozen=True)
class RouterLoss:
    """A run's router loss: its weight in the total, and the number of experts."""

    coefficient: float
    n_experts: int


def router_coefficient(model: PreTrainedModel, asked: float | None) -> float:
    """The loss's weight: `asked`, else the model's own; 0 for models that have no such loss.

    As in TRL, a mixture of experts is trained with its loss unless the coefficient is 0. Raises
    `ConfigError` where the loss was asked for and the model has none.
    """
    text = model.config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        if asked:
            raise ConfigError(
                f"'router_aux_loss_coef' is {asked:g}, and {type(model).__name__} returns no "
                "router logits, so it has no such loss; leave it out"
            )
        return 0.0
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0) if asked is None else asked


def top_k(model: PreTrainedModel) -> int:
    """How many experts a token chooses."""
    return int(model.config.get_text_config().num_experts_per_tok)


def router_sums(router_logits: Sequence[Tensor], multiplicity: Tensor, top_k: int) -> RouterSums:
    """Sums over L layers of `router_logits` [T, E], each token weighted by `multiplicity` [T]."""
    dtype = torch.promote_types(router_logits[0].dtype, torch.float32)
    weight = multiplicity.flatten().to(dtype)  # [T]
    chosen = probs = torch.zeros((), dtype=dtype, device=weight.device)
    for logits in router_logits:
        routing = logits.flatten(0, -2).to(dtype).softmax(-1)  # [T, E]
        taken = torch.zeros_like(routing).scatter_(1, routing.detach().topk(top_k).indices, 1.0)
        chosen = chosen + weight @ taken
        probs = probs + weight @ routing
    return RouterSums(chosen, probs, weight.sum() * len(router_logits))


def pack_router_sums(model: PreTrainedModel, output: Any, pack: Pack) -> RouterSums:
    """The sums of one pack from the decoder's `output`."""
    logits = getattr(output, "router_logits", None)
    if not logits:
        raise ModelError(
            f"{type(model).__name__} returned no router logits, which its auxiliary loss needs; "
            "set router_aux_loss_coef: 0 to train without it"
        )
    return router_sums(logits, pack.multiplicity, top_k(model))


def step_router_sums(
    parts: Sequence[RouterSums], n_experts: int, device: torch.device
) -> RouterSums:
    """The sums of a whole step, over its packs and over all ranks. fp64, no graph, no host sync."""
    total = torch.zeros(2 * n_experts + 1, dtype=torch.float64, device=device)
    for part in parts:
        total = total + torch.cat([part.chosen, part.probs.detach(), part.rows[None]]).double()
    chosen, probs, rows = sum_over_ranks(total).split([n_experts, n_experts, 1])
    return RouterSums(chosen, probs, rows[0])


def router_loss(step: RouterSums) -> Tensor:
    """The loss of a step, fp64: 1 where every expert is used alike and one is chosen."""
    return len(step.chosen) * (step.chosen / step.rows) @ (step.probs / step.rows)


def router_grad(step: RouterSums) -> Tensor:
    """[E]: d router_loss / d probs, the same for every pack of the step. fp64."""
    return len(step.chosen) * step.chosen / step.rows**2


@torch.no_grad()
def make_router_loss(model: PreTrainedModel, asked: float | None) -> RouterLoss | None:
    """The router loss that `model` is trained with, if any; see `router_coefficient`.

    `ModelError` unless the model's own loss on a few tokens is the one computed here.
    """
    coefficient = router_coefficient(model, asked)
    if not coefficient:
        return None
    n_vocabulary = n_embeddings(model)
    input_ids = torch.arange(24, device=model.device)[None] % n_vocabulary
    output = model(input_ids=input_ids, use_cache=False, output_router_logits=True)
    name = type(model).__name__
    own, logits = getattr(output, "aux_loss", None), getattr(output, "router_logits", None)
    way_out = "set router_aux_loss_coef: 0 to train without it"
    if own is None or not logits:
        raise ModelError(f"{name} gives no auxiliary loss for its router; {way_out}")
    ones = torch.ones(input_ids.numel(), device=input_ids.device)
    ours = float(router_loss(router_sums(logits, ones, top_k(model))))
    # The model may round probabilities to its logits' dtype, and break ties by that.
    tolerance = 16 * max(torch.finfo(logits[0].dtype).eps, 1e-6) * max(abs(ours), 1.0)
    if not abs(float(own) - ours) <= tolerance:
        raise ModelError(
            f"{name} computes an auxiliary loss of its own: {float(own):.6g} where load balancing "
            f"gives {ours:.6g}; {way_out}"
        )
    return RouterLoss(coefficient, logits[0].shape[-1])
