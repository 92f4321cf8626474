"""`linear_logps` for problems so small that calls cost more than work: all logits at once.

The same exact formulas in a dozen operations, any device. `impl="auto"` takes it where `is_tiny`.
Per row, with r = max z and the target left out of E = exp(z - r) and of its sum s_o:
    logp = -log(1 + s_o / s_y)        d z = (s_o at the target, -E elsewhere) / (s_o + s_y)
Callers have checked the arguments.
"""

import torch
from torch import Tensor

from .impls import ForwardResult, TokenStats
from .linear_logps_torch_tiles import ieee_matmul

# Measured on a CPU, fp32, forward and backward: at N V = 1,600 the chunked way takes 1.5 times as
# long, at 64,000 1.3 times, from 250,000 on (6 MiB here) neither is ahead. On a GPU, unmeasured:
# fp32 products of this size take less than 0.1 ms, about what the launches saved do.
LARGEST_BYTES = 12 * 2**20
LARGEST_PRODUCT = 2**30  # N V D


def is_tiny(
    hidden: Tensor,
    weight: Tensor,
    rounded: torch.dtype,
    *,
    joined: bool,
    workspace_bytes: int,
) -> bool:
    """Whether this is the way to go, and fits: six matrices [N, V], and copies of the operands.

    `joined`: an adapter [V, r] stands beside `weight`, and `hidden` is [N, D + r].
    """
    (n, d), v = hidden.shape, weight.shape[0]
    wide = torch.promote_types(rounded, torch.float32)
    copies = 3 if joined or weight.dtype != wide else 0
    size = wide.itemsize * (6 * n * v + copies * v * d + 4 * n * d)
    return size <= min(LARGEST_BYTES, workspace_bytes) and n * v * d <= LARGEST_PRODUCT


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    adapter: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden_grad: bool,
    need_weight_grad: bool,
    keep: bool,
    workspace_bytes: int,
) -> ForwardResult:
    """See `impls.ForwardResult`; what is saved is d logp / d (hidden @ weight.T), [N, V]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ignored = targets == ignore_index
    some = hidden.device.type != "cpu" or bool(ignored.any())  # a GPU is not waited for
    at, h = targets[:, None], hidden.to(dtype)
    if some:
        at, h = at.masked_fill(ignored[:, None], 0), h.masked_fill(ignored[:, None], 0)
    w = weight.to(hidden.dtype).to(dtype)
    if adapter is not None:
        w = torch.cat([w, adapter.to(hidden.dtype).to(dtype)], 1)
    slope = scale / temperature
    with ieee_matmul(hidden.device):
        if bias is None:
            a = h @ w.mT
        else:
            a = torch.addmm(bias.to(dtype), h, w.mT)
        tanh = None
        if softcap is None:
            z = a if slope == 1 else a * slope
        else:
            tanh = torch.tanh(a * (scale / softcap))
            z = tanh * (softcap / temperature)
        top = z.amax(1, keepdim=True)
        distance = z - top
        e = distance.exp().scatter_(1, at, 0)
        s_o = e.sum(1)
        log_sy = distance.gather(1, at).squeeze(1)
        logps = -torch.logaddexp(s_o.log() - log_sy, torch.zeros_like(s_o))
        inv_sum = 1 / (s_o + log_sy.exp())
        found = {}
        if stats:
            found = _stats(z, distance, e, log_sy, inv_sum, targets, set(stats))
            if some:
                found = {name: value.masked_fill(ignored, 0) for name, value in found.items()}
        grad = d_logit = None
        if need_hidden_grad or need_weight_grad:
            d_logit = e.mul_((-slope * inv_sum)[:, None])
            d_logit.scatter_(1, at, (slope * s_o * inv_sum)[:, None])
            if tanh is not None:
                d_logit.mul_(1 - tanh * tanh)
            if some:
                d_logit.masked_fill_(ignored[:, None], 0)
            if need_hidden_grad:
                grad = (d_logit @ w).to(hidden.dtype)
    return ForwardResult(
        token_logps=logps.masked_fill_(ignored, 0) if some else logps,
        hidden_grad=grad,
        saved=(d_logit,) if need_weight_grad and d_logit is not None else (),
        stats=TokenStats(**found) if stats else None,
    )


def weight_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    saved: tuple[Tensor, ...],
    grad_logps: Tensor,
    *,
    adapter: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """dW [V, D], or an adapter's gradient [V, r], and db [V] (None if not asked for)."""
    (d_logit,) = saved
    trained = weight if adapter is None else adapter
    ignored = targets == ignore_index
    h = hidden[:, hidden.shape[1] - trained.shape[1] :].to(d_logit.dtype)
    g = grad_logps.to(d_logit.dtype)
    scaled = (h * g[:, None]).masked_fill_(ignored[:, None], 0)
    with ieee_matmul(hidden.device):
        grad = (d_logit.mT @ scaled).to(trained.dtype)
        db = None
        if bias is not None and need_bias_grad:
            db = (d_logit.mT @ g.masked_fill(ignored, 0)).to(bias.dtype)
    return grad, db


def _stats(
    z: Tensor,
    distance: Tensor,
    e: Tensor,
    log_sy: Tensor,
    inv_sum: Tensor,
    targets: Tensor,
    names: set[str],
) -> dict[str, Tensor]:
    """With p_v = exp(distance_v) inv_sum; `e` lacks the target."""
    found = {}
    if "entropy" in names:
        # A masked logit of -inf has e = 0 and must not make 0 * inf.
        weighted = (e * distance.clamp(min=-1e4)).sum(1) + log_sy.exp() * log_sy.clamp(min=-1e4)
        found["entropy"] = -inv_sum.log() - weighted * inv_sum
    if "mean_logits" in names:
        found["mean_logits"] = z.mean(1)
    if "is_top1" in names:
        found["is_top1"] = z.argmax(1) == targets
    if "log_sum_sq_probs" in names:
        squares = (2 * distance).exp().sum(1)
        found["log_sum_sq_probs"] = squares.log() + 2 * inv_sum.log()
    return found
