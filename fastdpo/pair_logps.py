"""From the token log-probs of a pack to sums for its pairs, and from a loss's derivatives by pair
back to its tokens.

Both ways by segments and sorts in a fixed order: bitwise repeatable, no atomics, no host sync, no
graph. Sums are fp64: a log-ratio is a small difference of large sums. What the sums are used for is
objective.py's affair.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Pack


@dataclass(frozen=True)
class PairSums:
    """Sums over the scored tokens of P pairs of responses. fp64, in nat.

    policy, reference [P, 2, K]: by side (chosen, rejected) and part; K is 1, or 2 under LD-DPO:
        the tokens within the shorter response's length, and those beyond it. The reference's is
        None where there is none.
    lengths [P, 2]: scored tokens.
    weights [P]: WPO's; None where not asked for.
    columns: the dataset's own numbers, [P] each.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    weights: Tensor | None
    columns: dict[str, Tensor]


def pair_sums(
    token_logps: Tensor,
    ref_token_logps: Tensor | None,
    pack: Pack,
    *,
    by_length: bool,
    log_sum_sq_probs: Tensor | None = None,
) -> PairSums:
    """Sums `token_logps [N]` (no graph) over each pair's responses.

    by_length: two parts, for LD-DPO. log_sum_sq_probs [N]: then WPO's weights come too.
    """
    bounds = pack.cu_responses.long()
    lengths = bounds.diff()[pack.pairs].double()  # [P, 2]

    def sums(values: Tensor) -> Tensor:  # [N] -> [P, 2, K]
        if by_length:
            return _sums_by_length(values, pack)
        return per_response(values, pack)[pack.pairs].unsqueeze(-1)

    weights = None
    if log_sum_sq_probs is not None:
        # arXiv 2406.11827 eq. 2, aligned: every token's probability over sum_v p_v^2.
        aligned = per_response(token_logps.double() - log_sum_sq_probs.double(), pack)[pack.pairs]
        weights = torch.exp((aligned / lengths.clamp(min=1)).sum(1))
    return PairSums(
        policy=sums(token_logps),
        reference=None if ref_token_logps is None else sums(ref_token_logps),
        lengths=lengths,
        weights=weights,
        columns={name: values.double() for name, values in pack.columns.items()},
    )


def per_response(values: Tensor, pack: Pack) -> Tensor:
    """Sums of `values` [N] over each response: [R] fp64."""
    return torch.segment_reduce(
        values.detach().double(), "sum", offsets=pack.cu_responses.long(), initial=0
    )


def token_gradient(slopes: Tensor, pack: Pack, n: int) -> Tensor:
    """[N] fp64: d loss / d token log-prob, from `slopes` [P, 2, K] = d loss / d sums.

    A token's gradient is the sum over the pairs that its response is in.
    """
    bounds = pack.cu_responses.long()
    owner = torch.searchsorted(
        bounds[1:], torch.arange(n, device=bounds.device), right=True
    )  # [N]: the response of each token
    if slopes.shape[2] == 1:
        return _sum_by_response(slopes[:, :, 0].T.reshape(-1), pack)[owner]
    in_first, in_second = _parts(pack)  # [2P, L]
    first, second = slopes.transpose(0, 1).reshape(-1, 2).unbind(1)  # [2P]
    by_place = in_first * first[:, None] + in_second * second[:, None]  # [2P, L]
    place = torch.arange(n, device=bounds.device) - bounds[owner]
    return _sum_by_response(by_place, pack)[owner, place]


def _responses(pack: Pack) -> Tensor:
    """[2P]: the chosen responses of all pairs, then the rejected ones."""
    return pack.pairs.T.reshape(-1)


def _sum_by_response(values: Tensor, pack: Pack) -> Tensor:
    """[2P, ...] -> [R, ...]: sums over the pairs that share a response, in their order."""
    responses, order = torch.sort(_responses(pack), stable=True)
    n_responses = len(pack.cu_responses) - 1
    bounds = torch.searchsorted(responses, torch.arange(n_responses + 1, device=values.device))
    return torch.segment_reduce(values[order].contiguous(), "sum", offsets=bounds, initial=0)


def _parts(pack: Pack) -> tuple[Tensor, Tensor]:
    """Which places [2P, L] of a response lie within the other's length, and which beyond it."""
    lengths = pack.cu_responses.long().diff()[pack.pairs]  # [P, 2]
    shared = lengths.amin(1).repeat(2)[:, None]  # [2P, 1]
    own = lengths.T.reshape(-1)[:, None]
    # No response is longer than max_seqlen + 1: the longest sequence without its last token.
    place = torch.arange(pack.max_seqlen + 1, device=own.device)
    return (place < shared).double(), ((place >= shared) & (place < own)).double()


def _sums_by_length(values: Tensor, pack: Pack) -> Tensor:
    """[N] -> [P, 2, 2]: sums over the two parts of each response of each pair."""
    starts = pack.cu_responses.long()[_responses(pack)][:, None]  # [2P, 1]
    place = torch.arange(pack.max_seqlen + 1, device=values.device)
    last = max(len(values) - 1, 0)
    at = (starts + place).clamp(max=last)  # [2P, L]; what is past a response's end is masked
    taken = values.detach().double()[at] if len(values) else values.new_zeros(at.shape).double()
    parts = [(taken * part).sum(1) for part in _parts(pack)]  # [2P] each
    return torch.stack(parts, 1).reshape(2, -1, 2).transpose(0, 1)
