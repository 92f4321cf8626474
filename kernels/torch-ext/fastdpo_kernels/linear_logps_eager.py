"""`linear_logps` for problems so small that calls cost more than work: all logits at once.

On a CPU it is `linear_logps_torch.py` without its bookkeeping: the products and sums of the tiles
that it has in a workspace of the default size, and so the same bits but for the gradients; a call
in which a row overflows goes there. `impl="auto"` takes it where `is_tiny`.
With E = exp(z - z_y), by exp2 of bits, and its sum s_o, the target left out:
    logp = -log(1 + s_o)        d logp / d z = (s_o at the target, -E elsewhere) / (1 + s_o)
A GPU, which nobody waits for to hear of an overflow, takes `_by_log_odds`.
Callers have checked the arguments.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_logps_torch
from .impls import ForwardResult, TokenStats, is_factored
from .linear_logps_targets import left_out
from .linear_logps_torch_tiles import (
    COLS,
    NATS,
    ROWS,
    Head,
    divide_rows,
    exponents,
    one_minus_square,
    spans,
    target_logits,
)

# On a CPU: at most two tiles of the chunked way. Which is faster is measured by
# `python -m benchmarks.bench_linear_logps`: rows "fastdpo" and "fastdpo torch" at N <= 500.
LARGEST_V = 4096
LARGEST_BYTES = 64 * 2**20
# On a GPU, unmeasured: the kernels' way costs the host some 0.2 ms, ten launches of Triton's and a
# plan (and seconds once, to compile), this one about 25 launches of torch's, 0.1 ms. What it adds
# in work should be less than the difference: some ten passes over [N, V] in fp32 are 84 MB at this
# size, below 0.1 ms at 1 TB/s and mostly in L2; gradients in fp32 2 N V D operations each, below
# 0.1 ms at 20 TFLOP/s.
LARGEST_GPU_CELLS = 2**21
LARGEST_GPU_PRODUCTS = 2**30


def is_tiny(
    hidden: Tensor,
    weight: Tensor,
    rounded: torch.dtype,
    *,
    joined: bool,
    workspace_bytes: int,
) -> bool:
    """Whether this is the way to go, and fits: six matrices [N, V], and copies of the operands.

    `joined`: an adapter [V, r] stands beside `weight`, and `hidden` is as wide as both.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    if hidden.device.type == "cuda":
        small = n * v <= LARGEST_GPU_CELLS and n * v * d <= LARGEST_GPU_PRODUCTS
    else:
        small = hidden.device.type == "cpu" and v <= LARGEST_V
    wide = torch.promote_types(rounded, torch.float32)
    copies = 3 if joined or weight.dtype != wide else 0
    size = wide.itemsize * (6 * n * v + copies * v * d + 4 * n * d)
    return small and size <= min(LARGEST_BYTES, workspace_bytes)


def _may_wait(device: torch.device) -> bool:
    """Whether the host may look at values."""
    return device.type == "cpu"


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
    need_bias_grad: bool,
    keep: bool,
    workspace_bytes: int,
) -> ForwardResult:
    """See `impls.ForwardResult`; what is saved is d logp / d (hidden @ weight.T), [N, V]."""
    head = Head(weight, adapter, bias, softcap, scale, temperature, rounded)
    head_grad = need_weight_grad or need_bias_grad
    if not _may_wait(hidden.device):
        return _by_log_odds(
            head, hidden, targets, ignore_index, set(stats), need_hidden_grad, head_grad
        )
    ignored = targets == ignore_index
    some = bool(ignored.any())
    y, h = targets, head.operand(hidden)
    if some:
        y, h = y.masked_fill(ignored, 0), h.masked_fill(ignored[:, None], 0)
    w, b = head.rows(0, weight.shape[0])
    z_y, flat_y = target_logits(head, h, w[y], y)
    distance, tanh = _exponents(head, h, w, b, z_y)  # z - z_y, in bits
    e = distance.exp2() if stats else distance.exp2_()
    e.scatter_(1, y[:, None], 0)
    s_o = functools.reduce(torch.add, (part.sum(1) for part in e.split(COLS, 1)))  # as of tiles
    if not (s_o < linear_logps_torch.OVERFLOW).all():  # nor if some are not numbers
        return linear_logps_torch.forward(
            hidden, weight, targets, rounded=rounded, adapter=adapter, bias=bias,
            softcap=softcap, scale=scale, temperature=temperature, ignore_index=ignore_index,
            stats=stats, need_hidden_grad=need_hidden_grad, need_weight_grad=need_weight_grad,
            need_bias_grad=need_bias_grad, keep=keep, workspace_bytes=workspace_bytes,
        )  # fmt: skip
    logps = -s_o.log1p()
    inv_sum = 1 / (1 + s_o)
    found = {}
    if stats:
        found = _stats(distance, e, z_y, logps, inv_sum, y, set(stats))
        if some:
            found = {name: value.masked_fill(ignored, 0) for name, value in found.items()}
    grad = factor = d_logit = None
    if need_hidden_grad or head_grad:
        d_logit = e.mul_((-head.slope * inv_sum)[:, None])
        if tanh is not None:
            d_logit.mul_(one_minus_square(tanh))
        d_logit.scatter_(1, y[:, None], (head.slope * flat_y * s_o * inv_sum)[:, None])
        if some:
            d_logit.masked_fill_(ignored[:, None], 0)
        if need_hidden_grad:
            grad = d_logit @ w
            if is_factored(rounded):
                factor = (head.slope * s_o * inv_sum).masked_fill(ignored, 0)
                divide_rows(grad, factor)
            grad = grad.to(rounded)
    return ForwardResult(
        token_logps=logps.masked_fill_(ignored, 0) if some else logps,
        hidden_grad=grad,
        hidden_factor=factor,
        saved=(d_logit,) if head_grad and d_logit is not None else (),
        stats=TokenStats(**found) if stats else None,
    )


def _by_log_odds(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    ignore_index: int,
    stats: set[str],
    need_hidden_grad: bool,
    need_head_grad: bool,
) -> ForwardResult:
    """`forward` in the frame of each row's own largest logit, which nothing overflows.

    With l = log sum exp z, the target left out: logp = -softplus(l - z_y), its slope in z_y is
    sigmoid(l - z_y), in others -p. Reads no value on the host, so a CUDA graph can hold it.
    """
    v = head.weight.shape[0]
    y = targets.clamp(0, v - 1)
    ignored = targets == ignore_index
    skip = ignored | (y != targets)
    h = head.operand(hidden).masked_fill(skip[:, None], 0)
    w, b = head.rows(0, v)
    z = torch.mm(h, w.mT, out_dtype=head.dtype) if head.halves else h @ w.mT  # [N, V]
    if b is not None:
        z += b
    tanh = None
    if head.softcap is None:
        z *= head.slope
    else:
        tanh = z.mul_(head.scale / head.softcap).tanh_()
        z = tanh * (head.softcap / head.temperature)
    at_y = y[:, None]
    z_y = z.gather(1, at_y)  # [N, 1]
    found = {}
    if "mean_logits" in stats:
        found["mean_logits"] = z.mean(1)
    if "is_top1" in stats:
        found["is_top1"] = z.argmax(1) == y
    z.scatter_(1, at_y, -math.inf)
    others = z.logsumexp(1, keepdim=True)
    odds = others - z_y  # of "not y", in nat
    logps = F.logsigmoid(-odds)
    grad = factor = d_logit = None
    if stats or need_hidden_grad or need_head_grad:
        distance = z.sub_(torch.logaddexp(others, z_y))  # log p, -inf at the target
        p = distance.exp()
        if "entropy" in stats:
            # A masked logit has p = 0 and must not make 0 * inf.
            of_others = distance.clamp(min=-1e4).mul_(p).sum(1, keepdim=True)
            found["entropy"] = -of_others - logps.exp() * logps.clamp(min=-1e4)
        if "log_sum_sq_probs" in stats:
            squares = distance.mul_(2).logsumexp(1, keepdim=True)
            found["log_sum_sq_probs"] = torch.logaddexp(squares, 2 * logps)
        d_logit = p.mul_(-head.slope)
        of_target = odds.sigmoid() * head.slope
        factor = of_target.masked_fill(skip[:, None], 0).squeeze(1)
        if tanh is not None:
            flat = one_minus_square(tanh)
            of_target *= flat.gather(1, at_y)
            d_logit *= flat
        d_logit.scatter_(1, at_y, of_target).masked_fill_(skip[:, None], 0)
    if need_hidden_grad and d_logit is not None:
        grad = d_logit @ w.to(d_logit.dtype)
        if is_factored(head.rounded) and factor is not None:
            divide_rows(grad, factor)
        grad = grad.to(head.rounded)
    found = {name: value.reshape(-1).masked_fill(skip, 0) for name, value in found.items()}
    logps = logps.squeeze(1).masked_fill_(skip, math.nan).masked_fill_(ignored, 0)
    return ForwardResult(
        token_logps=logps,
        hidden_grad=grad,
        hidden_factor=factor if grad is not None and is_factored(head.rounded) else None,
        saved=(d_logit,) if need_head_grad and d_logit is not None else (),
        stats=TokenStats(**found) if stats else None,
    )


def _exponents(
    head: Head, h: Tensor, w: Tensor, b: Tensor | None, z_y: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`exponents` [N, V] by the products of the chunked way's tiles: a library may give another
    size of product other bits, and another size may be another library's."""
    if len(h) <= ROWS and len(w) <= COLS:
        return exponents(head, h, w, b, z_y)
    out = h.new_empty(len(h), len(w))
    tanh = None if head.softcap is None else torch.empty_like(out)
    for r0, r1 in spans(len(h), ROWS):
        for v0, v1 in spans(len(w), COLS):
            part = None if b is None else b[v0:v1]
            _, cap = exponents(head, h[r0:r1], w[v0:v1], part, z_y[r0:r1], out[r0:r1, v0:v1])
            if tanh is not None and cap is not None:
                tanh[r0:r1, v0:v1] = cap
    return out, tanh


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
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW [V, D], or an adapter's gradient [V, r], and db [V]; None for what is not asked for."""
    if len(saved) > 1:  # a row had overflowed
        return linear_logps_torch.weight_grad(
            hidden, weight, targets, saved, grad_logps, rounded=rounded, adapter=adapter, bias=bias,
            softcap=softcap, scale=scale, temperature=temperature, ignore_index=ignore_index,
            workspace_bytes=workspace_bytes, need_weight_grad=need_weight_grad,
            need_bias_grad=need_bias_grad,
        )  # fmt: skip
    d_logit = next(iter(saved))
    ignored = left_out(targets, weight.shape[0], ignore_index)
    g = grad_logps.to(d_logit.dtype)
    grad = db = None
    if need_weight_grad:
        trained = weight if adapter is None else adapter
        head = Head(weight, adapter, bias, softcap, scale, temperature, rounded)
        scaled = (head.met(hidden.to(rounded)) * g[:, None]).masked_fill_(ignored[:, None], 0)
        grad = (d_logit.mT @ scaled).to(trained.dtype)
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
