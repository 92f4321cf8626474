"""`preference_loss` in torch: segment sums in fp64 in a fixed order, then a few [P] operations.

Runs on any device without waiting for it. Callers have checked the arguments.
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
    bounds = cu_responses.long()

    def per_response(values: Tensor) -> Tensor:  # [N] -> [R]
        return torch.segment_reduce(values.double(), "sum", offsets=bounds, initial=0)

    logps = per_response(token_logps)
    if ref_token_logps is not None:
        ratios = per_response(token_logps.double() - ref_token_logps.double())
    else:
        assert ref_logps is not None
        ratios = logps - ref_logps.double()
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
        logps=logps.to(out),
        chosen_slope=chosen_slope.to(out),
        rejected_slope=rejected_slope.to(out),
    )
