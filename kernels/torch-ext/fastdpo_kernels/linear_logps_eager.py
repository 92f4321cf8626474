"""`linear_logps` for heads so small that calls cost more than work: all logits at once, on a CPU.

`linear_logps_torch.py` on one tile without its bookkeeping, and so to the same bits but for the
gradients and the entropy; a call in which a row overflows goes there. `impl="auto"` takes it where
`is_tiny`.
With E = exp(z - z_y), by exp2 of bits, and its sum s_o, the target left out:
    logp = -log(1 + s_o)        d logp / d z = (s_o at the target, -E elsewhere) / (1 + s_o)
Callers have checked the arguments.
"""

import torch
from torch import Tensor

from . import linear_logps_torch
from .impls import ForwardResult, TokenStats
from .linear_logps_torch_tiles import NATS, Head, exponents, one_minus_square, target_logits

# At most two tiles of the chunked way. Which is faster, on a CPU, is measured by
# `python -m benchmarks.bench_linear_logps`: rows "fastdpo" and "fastdpo torch" at N <= 500.
LARGEST_V = 4096
LARGEST_BYTES = 64 * 2**20


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
    if hidden.device.type != "cpu" or v > LARGEST_V:
        return False
    wide = torch.promote_types(rounded, torch.float32)
    copies = 3 if joined or weight.dtype != wide else 0
    size = wide.itemsize * (6 * n * v + copies * v * d + 4 * n * d)
    return size <= min(LARGEST_BYTES, workspace_bytes)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rounded: torch.dtype,
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
    head = Head(weight, adapter, bias, softcap, scale, temperature, rounded)
    ignored = targets == ignore_index
    some = bool(ignored.any())
    y, h = targets, head.operand(hidden)
    if some:
        y, h = y.masked_fill(ignored, 0), h.masked_fill(ignored[:, None], 0)
    w, b = head.rows(0, weight.shape[0])
    z_y, flat_y = target_logits(head, h, w[y], y)
    distance, tanh = exponents(head, h, w, b, z_y)  # z - z_y, in bits
    e = distance.exp2() if stats else distance.exp2_()
    e.scatter_(1, y[:, None], 0)
    s_o = e.sum(1)
    if not (s_o < linear_logps_torch.OVERFLOW).all():  # nor if some are not numbers
        return linear_logps_torch.forward(
            hidden, weight, targets, rounded=rounded, adapter=adapter, bias=bias,
            softcap=softcap, scale=scale, temperature=temperature, ignore_index=ignore_index,
            stats=stats, need_hidden_grad=need_hidden_grad, need_weight_grad=need_weight_grad,
            keep=keep, workspace_bytes=workspace_bytes,
        )  # fmt: skip
    logps = -s_o.log1p()
    inv_sum = 1 / (1 + s_o)
    found = {}
    if stats:
        found = _stats(distance, e, z_y, logps, inv_sum, y, set(stats))
        if some:
            found = {name: value.masked_fill(ignored, 0) for name, value in found.items()}
    grad = d_logit = None
    if need_hidden_grad or need_weight_grad:
        d_logit = e.mul_((-head.slope * inv_sum)[:, None])
        if tanh is not None:
            d_logit.mul_(one_minus_square(tanh))
        d_logit.scatter_(1, y[:, None], (head.slope * flat_y * s_o * inv_sum)[:, None])
        if some:
            d_logit.masked_fill_(ignored[:, None], 0)
        if need_hidden_grad:
            grad = (d_logit @ w).to(rounded)
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
    rounded: torch.dtype,
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
    if len(saved) > 1:  # a row had overflowed
        return linear_logps_torch.weight_grad(
            hidden, weight, targets, saved, grad_logps, rounded=rounded, adapter=adapter, bias=bias,
            softcap=softcap, scale=scale, temperature=temperature, ignore_index=ignore_index,
            workspace_bytes=workspace_bytes, need_bias_grad=need_bias_grad,
        )  # fmt: skip
    d_logit = next(iter(saved))
    trained = weight if adapter is None else adapter
    ignored = targets == ignore_index
    h = hidden[:, hidden.shape[1] - trained.shape[1] :].to(rounded).to(d_logit.dtype)
    g = grad_logps.to(d_logit.dtype)
    scaled = (h * g[:, None]).masked_fill_(ignored[:, None], 0)
    grad = (d_logit.mT @ scaled).to(trained.dtype)
    db = None
    if bias is not None and need_bias_grad:
        db = (d_logit.mT @ g.masked_fill(ignored, 0)).to(bias.dtype)
    return grad, db


def _stats(
    distance: Tensor,
    e: Tensor,
    z_y: Tensor,
    logps: Tensor,
    inv_sum: Tensor,
    y: Tensor,
    names: set[str],
) -> dict[str, Tensor]:
    """With log p_v = ln 2 distance_v + logp; `e` lacks the target."""
    found = {}
    if "entropy" in names:
        # A masked logit of -inf has e = 0 and must not make 0 * inf.
        weighted = distance.clamp(min=-1e4).mul_(e).sum(1)
        found["entropy"] = -logps - weighted * (NATS * inv_sum)
    if "mean_logits" in names:
        found["mean_logits"] = (distance.mean(1) + z_y) * NATS
    if "is_top1" in names:
        found["is_top1"] = distance.argmax(1) == y
    if "log_sum_sq_probs" in names:
        top = distance.amax(1)
        squares = (distance - top[:, None]).mul_(2).exp2_().sum(1)
        found["log_sum_sq_probs"] = squares.log() + 2 * (top * NATS + logps)
    return found
