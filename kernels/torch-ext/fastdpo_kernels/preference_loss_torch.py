"""`preference_loss` in torch: segment sums in fp64 in a fixed order, then a few [P] operations.

Runs on any device without waiting for it. Callers have checked the arguments, but what lies on a
GPU nobody has looked at: bounds and pairs are kept inside their memory there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .impls import PreferenceForward


def forward(
    token_logps: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> PreferenceForward:
    """See `impls.PreferenceForward`.

    Everything [R] and [P] is fp64 until it is handed back: these vectors are short, and a
    log-ratio is a small difference of large sums.
    """
    r, n = len(cu_responses) - 1, len(token_logps)
    bounds, broken = cu_responses.long(), None
    if token_logps.device.type != "cpu":
        bounds, pairs, broken = _inside(bounds, pairs, n)

    def per_response(values: Tensor) -> Tensor:  # [N] -> [R], or [R + 1] with `broken`
        sums = torch.segment_reduce(values.double(), "sum", offsets=bounds, initial=0)
        return sums if broken is None else sums.masked_fill_(broken, torch.nan)

    logps = per_response(token_logps)
    if ref_token_logps is not None:
        ratios = per_response(token_logps.double() - ref_token_logps.double())
    else:
        assert ref_logps is not None
        ratios = logps - F.pad(ref_logps.double(), (0, len(logps) - r))
    rewards = beta * ratios[pairs]  # [P, 2]
    margins = rewards[:, 0] - rewards[:, 1]  # [P]
    if loss_type == "ipo":
        lengths = bounds.diff().clamp(min=1).double()
        chosen, rejected = (ratios / lengths)[pairs].unbind(1)
        off = chosen - rejected - 1 / (2 * beta)
        losses = off * off
        chosen_slope, rejected_slope = (2 * off[:, None] / lengths[pairs]).unbind(1)
        rejected_slope = -rejected_slope
    else:
        if loss_type == "sigmoid":
            losses = -F.logsigmoid(margins)
            if label_smoothing:
                losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
            chosen_slope = beta * (label_smoothing - torch.sigmoid(-margins))
        else:  # hinge
            losses = (1 - margins).clamp(min=0)
            chosen_slope = -beta * (margins < 1).double()
        rejected_slope = -chosen_slope

    out = torch.promote_types(token_logps.dtype, torch.float32)
    return PreferenceForward(
        losses=losses.to(out),
        chosen_rewards=rewards[:, 0].to(out),
        rejected_rewards=rewards[:, 1].to(out),
        logps=logps[:r].to(out),
        chosen_slope=chosen_slope.to(out),
        rejected_slope=rejected_slope.to(out),
    )


def _inside(bounds: Tensor, pairs: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds [R + 2] that rise within [0, n], pairs within [0, R], and which responses [R + 1] are
    not as they were given; the last one, empty, stands for those that do not exist."""
    r = len(bounds) - 1
    broken = (bounds.diff() < 0) | (bounds[:-1] < 0) | (bounds[1:] > n)
    bounds = F.pad(bounds.clamp(0, n), (0, 1), value=n).cummax(0).values
    pairs = pairs.where((pairs >= 0) & (pairs < r), r)
    return bounds, pairs, F.pad(broken, (0, 1), value=True)
