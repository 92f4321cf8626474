"""The check before the first update: a reference that is the policy itself gives margins of 0."""

import torch

from .errors import ModelError
from .objective import PackLoss, ScoredPack


def check_first_step(scored: ScoredPack, loss: PackLoss, beta: float, dtype: torch.dtype) -> None:
    """Raises `ModelError` where policy and reference differ by more than rounding in `dtype`.

    Token log-probs err by a few eps times their size, at random over a response's n tokens, so a
    response's sum errs by about 8 eps sqrt(n) times the mean |log-prob|. eps is at least fp32's, in
    which normalisation layers compute whatever the model's dtype.
    """
    logratios = torch.cat([loss.chosen_rewards, loss.rejected_rewards]) / beta
    lengths = scored.pack.cu_responses.diff()[scored.pack.pairs.T.reshape(-1)]
    size = scored.token_logps.abs().mean().clamp(min=1.0)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    rounding = 8 * eps * lengths.clamp(min=1).sqrt() * size
    if (logratios.abs() > rounding).any():
        worst = int((logratios.abs() - rounding).argmax())
        raise ModelError(
            "before the first update policy and reference differ by "
            f"{float(logratios[worst]):+.3g} nat on a response of {int(lengths[worst])} tokens, "
            "yet the reference is the initial policy: look for dropout still on, an adapter that "
            "was trained before, or another dtype; first_step_check=False trains regardless"
        )
