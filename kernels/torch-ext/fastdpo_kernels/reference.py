"""The mathematics of every op, eager, differentiable by plain autograd, in any float dtype.

This is what the fast implementations are held to (in fp64: the oracle of the tests), and what to
read first. It materialises the [N, V] logits and loops over responses: it is neither fast nor
small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .impls import PreferenceForward, TokenStats


def logits_reference(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Logits [N, V] of `hidden` [N, D] and `weight` [V, D], with `lora` (A [r, D], B [V, r], s)."""
    z = hidden @ weight.mT
    if lora is not None:
        a, b, scaling = lora
        z = z + scaling * (hidden @ a.mT) @ b.mT
    if bias is not None:
        z = z + bias
    z = scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, TokenStats]:
    """log softmax(logits)[n, targets[n]] for every row n, [N], and all statistics.

    Operands are multiplied in the dtype of `hidden`, raised to fp32 at least. Rows at
    `ignore_index` give 0, whatever their hidden row holds.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ignored = targets == ignore_index
    hidden_rows = hidden.to(dtype).masked_fill(ignored[:, None], 0)
    rounded = weight.to(hidden.dtype).to(dtype)
    if lora is not None:
        a, b = (matrix.to(hidden.dtype).to(dtype) for matrix in lora[:2])
        lora = (a, b, lora[2])
    z = logits_reference(
        hidden_rows,
        rounded,
        bias=None if bias is None else bias.to(dtype),
        lora=lora,
        softcap=softcap,
        scale=scale,
        temperature=temperature,
    )
    y = targets.masked_fill(ignored, 0)
    log_p = F.log_softmax(z, dim=-1)  # [N, V]
    logps = log_p.gather(1, y[:, None]).squeeze(1).masked_fill(ignored, 0)
    with torch.no_grad():
        stats = TokenStats(
            entropy=torch.special.entr(log_p.exp()).sum(-1).masked_fill(ignored, 0),
            mean_logits=z.mean(-1).masked_fill(ignored, 0),
            is_top1=(z.argmax(-1) == y) & ~ignored,
            log_sum_sq_probs=torch.logsumexp(2 * log_p, -1).masked_fill(ignored, 0),
        )
    return logps, stats


def preference_loss_reference(
    token_logps: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceForward:
    """Losses of pairs of responses; `losses` carries the autograd graph back to `token_logps`.

    sigmoid: DPO (arXiv 2305.18290, eq. 7), with label smoothing as in cDPO. hinge: SLiC's loss
    (2305.10425) on DPO's margin. ipo: 2310.12036, eq. 17, with each log-ratio averaged over its
    response's tokens (as TRL does).
    """
    token_logps = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    bounds = cu_responses.tolist()
    spans = list(zip(bounds, bounds[1:], strict=False))

    def per_response(values: Tensor) -> Tensor:  # [N] -> [R]
        return torch.stack([values[a:b].sum() for a, b in spans]) if spans else values[:0]

    logps = per_response(token_logps)
    if ref_token_logps is not None:
        ref_logps = per_response(ref_token_logps.to(token_logps))
    assert ref_logps is not None
    ratios = logps - ref_logps.to(token_logps)  # [R]
    lengths = torch.tensor([max(b - a, 1) for a, b in spans]).to(token_logps)  # empty: 1
    chosen, rejected = pairs.long().unbind(1)
    margins = beta * (ratios[chosen] - ratios[rejected])  # [P]
    if loss_type == "sigmoid":
        right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif loss_type == "hinge":
        losses = torch.relu(1 - margins)
    elif loss_type == "ipo":
        per_token = ratios / lengths
        losses = (per_token[chosen] - per_token[rejected] - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"no reference for loss_type={loss_type!r}")

    # What the fused implementations finish in their forward: d losses / d logps of each side.
    if loss_type == "sigmoid":
        slope = beta * (label_smoothing - torch.sigmoid(-margins))
    elif loss_type == "hinge":
        slope = -beta * (margins < 1).to(margins)
    else:
        per_token = ratios / lengths
        slope = 2 * (per_token[chosen] - per_token[rejected] - 1 / (2 * beta))
    by_token = loss_type == "ipo"
    return PreferenceForward(
        losses=losses,
        chosen_rewards=(beta * ratios[chosen]).detach(),
        rejected_rewards=(beta * ratios[rejected]).detach(),
        logps=logps.detach(),
        chosen_slope=(slope / lengths[chosen] if by_token else slope).detach(),
        rejected_slope=-(slope / lengths[rejected] if by_token else slope).detach(),
    )
