"""`linear_logps` in chunked torch: the fast path on CPU, and the way where Triton cannot run.

Per row, in a frame r: E_v = exp(z_v - r) for v != y, s_o = sum_v E_v, s_y = exp(z_y - r), and then
    logp = -log(1 + s_o / s_y)        d_hidden = (s_o W[y] - E @ W) / (s_o + s_y)
(times the logit transform's slope). Tiles hold logits in bits, for exp2. On a CPU r = z_y, known
before the first tile, so nothing is ever rescaled; the rare rows that overflow this frame are done
again with r = max z. Elsewhere all rows use that second frame (one more GEMM): asking which
overflowed would wait for the device. The head's gradient: see `weight_grad`.
Callers have checked the arguments.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .impls import ForwardResult, TokenStats, is_factored
from .linear_logps_targets import left_out, outside
from .linear_logps_torch_tiles import (
    BITS,
    NATS,
    Head,
    accumulate,
    accumulate_transposed,
    divide_rows,
    exponents,
    may_keep,
    one_minus_square,
    put_target,
    row_max,
    spans,
    target_logits,
    tile_shape,
)

LOWEST = torch.finfo(torch.float32).min  # stands for a bias of -inf, where E = 0
# Of s_o in the frame r = z_y: logp < -64, where products of E have 10 decimal digits of room left.
OVERFLOW = math.exp(64.0)


@dataclass(frozen=True)
class _Pass:
    """What all passes over the vocabulary share."""

    head: Head
    cols: int
    stats: tuple[str, ...]
    need_grad: bool
    mean: tuple[Tensor, Tensor | float] | None  # mean row of the weight [D], mean bias

    @property
    def entropy_by_grad(self) -> bool:
        """sum E (h W^T + b) = h (E @ W)^T + E @ b: what the gradient needs gives the entropy.
        Not from 16-bit E, and not under a softcap."""
        head = self.head
        asked = "entropy" in self.stats and self.need_grad
        return asked and head.softcap is None and not head.halves


@dataclass
class _Sums:
    """What a pass over the vocabulary gathers about k rows."""

    others: Tensor  # [k] sum of E over v != y
    weighted: Tensor  # [k] sum of E (z - r) in bits, or of E b: the entropy
    tanh: Tensor  # [k] sum of tanh under a softcap: the mean logit
    top: Tensor  # [k] largest z - r so far in bits, ...
    is_top1: Tensor  # [k] ... whether the target's column was the first to have it, ...
    squares: Tensor  # [k] ... and the sum of 4^(z - r - top), target included

    @staticmethod
    def zeros(rows: int, like: Tensor) -> "_Sums":
        zero = [like.new_zeros(rows) for _ in range(4)]
        top = like.new_full((rows,), -math.inf)
        no = torch.zeros(rows, dtype=torch.bool, device=like.device)
        return _Sums(zero[0], zero[1], zero[2], top, no, zero[3])


@dataclass(frozen=True)
class _Rows:
    """Finished rows: their sums of E, and what `forward` stores of them."""

    others: Tensor
    logps: Tensor
    grad: Tensor | None
    factor: Tensor  # slope (1 - p_y)
    saved: tuple[Tensor, ...]  # r in bits, 1 / (s_o + s_y), what stands for E at the target in dW
    stats: dict[str, Tensor]


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
    """`hidden` [N, D], `weight` [V, D], `targets` [N]; see `impls.ForwardResult`.

    Operands are rounded to `rounded`, tile by tile, and so is the gradient of `hidden`. With an
    `adapter` [V, r], `hidden` is what `beside_adapter` returns. `keep`: E may stay for
    `weight_grad`.
    """
    (n, d), v, device = hidden.shape, weight.shape[0], hidden.device
    head = Head(weight, adapter, bias, softcap, scale, temperature, rounded)
    fixed = device.type == "cpu"

    def new(*shape: int, dtype: torch.dtype = head.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    head_grad = need_weight_grad or need_bias_grad
    logps, saved = new(n), [new(n) for _ in range(3)] if head_grad else []
    hidden_grad = new(n, d, dtype=rounded) if need_hidden_grad else None
    factor = new(n) if need_hidden_grad and is_factored(rounded) else None
    found = {s: new(n, dtype=torch.bool if s == "is_top1" else head.dtype) for s in stats}
    tiles = head.tiles + bool(stats)
    keep = keep and head_grad and may_keep(head, n, workspace_bytes, tiles)
    kept = new(n, v) if keep else None
    rows, cols = tile_shape(head, n, workspace_bytes - (0 if kept is None else kept.nbytes), tiles)
    mean = _mean_row(head, cols) if "mean_logits" in stats and softcap is None else None
    job = _Pass(head, cols, stats, need_hidden_grad, mean)

    def run(index: Tensor | slice, at_max: bool, store: Tensor | None) -> Tensor:
        y = targets[index]
        skip = left_out(y, v, ignore_index)
        h = head.operand(hidden[index]).masked_fill(skip[:, None], 0)
        done = _run_rows(job, h, y.masked_fill(skip, 0), at_max, store)
        bad = None if fixed else outside(y, v, ignore_index)
        for whole, part in ((logps, done.logps), *((found[s], done.stats[s]) for s in stats)):
            part = part.masked_fill(skip, 0)
            if bad is not None and part.is_floating_point():
                part.masked_fill_(bad, math.nan)
            whole[index] = part
        if hidden_grad is not None and done.grad is not None:
            hidden_grad[index] = done.grad.masked_fill_(skip[:, None], 0).to(rounded)
        if factor is not None:
            factor[index] = done.factor.masked_fill(skip, 0)
        if saved:
            for whole, part in zip(saved, done.saved, strict=True):
                whole[index] = part
        return done.others

    for start, end in spans(n, rows):
        some = slice(start, end)
        others = run(some, not fixed, None if kept is None else kept[some])
        # Not a number counts as overflow: the other frame shows whether it is the row's own.
        overflow = ~(others < OVERFLOW)
        if fixed and overflow.any():
            again = start + overflow.nonzero().squeeze(1)
            if kept is None:
                run(again, True, None)
            else:  # whole rows of E, with their logits in as much room as a tile takes
                for part in again.split(max(rows * cols // (2 * v), 1)):
                    store = new(len(part), v)
                    run(part, True, store)
                    kept.index_copy_(0, part, store)
    if kept is not None:
        saved.append(kept)
    return ForwardResult(
        token_logps=logps,
        hidden_grad=hidden_grad,
        hidden_factor=factor,
        saved=tuple(saved),
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
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW [V, D] and db [V] in the dtypes of the weight and the bias; None for what is not asked.

    With an `adapter` [V, r] its gradient takes the place of dW.

    dW = -slope E^T @ (g / (s_o + s_y) H), where E holds -s_o (times its tanh slope) at the target;
    db is the same with a column of ones as H, and takes no GEMM.
    E comes from `saved` if forward could keep it, otherwise each tile is computed again; each row
    of dW is written once.
    """
    frame, inv_sum, target_e, *kept = saved
    n, v = len(hidden), weight.shape[0]
    head = Head(weight, adapter, bias, softcap, scale, temperature, rounded)
    trained = weight if adapter is None else adapter
    grad = bias_grad = None
    if need_weight_grad:
        grad = torch.empty_like(trained, memory_format=torch.contiguous_format)
    if bias is not None and need_bias_grad:
        bias_grad = torch.empty_like(bias)
    tiles = 0 if kept else head.tiles
    budget = workspace_bytes - (kept[0].nbytes if kept else 0)
    rows, cols = tile_shape(head, n, budget, tiles)
    for v0, v1 in spans(v, cols):
        again = None if kept else head.rows(v0, v1)
        total = bias_total = None
        if grad is not None:  # its own rows hold the sums, if they have the dtype
            whole = grad.dtype == head.dtype
            total = grad[v0:v1] if whole else inv_sum.new_empty(v1 - v0, grad.shape[1])
            total.zero_()
        if bias_grad is not None:
            bias_total = inv_sum.new_zeros(v1 - v0)
        for r0, r1 in spans(n, rows):
            skip = left_out(targets[r0:r1], v, ignore_index)
            k = -head.slope * grad_logps[r0:r1].to(head.dtype) * inv_sum[r0:r1]
            k = k.masked_fill(skip, 0)
            h = hidden[r0:r1]
            if again is not None or total is not None:
                h = head.operand(h).masked_fill(skip[:, None], 0)
            if again is None:
                tile = kept[0][r0:r1, v0:v1]
            else:
                tile = _tile_again(head, h, *again, frame[r0:r1])
                y = targets[r0:r1].masked_fill(skip, 0)
                put_target(tile, y - v0, target_e[r0:r1])
            if total is not None:
                scaled = head.met(h).mul(k[:, None])
                if head.halves and head.rounded == torch.bfloat16:
                    accumulate(head, total, tile.mT, scaled.to(head.rounded))
                else:  # fp16 has no room for small gradients: fp32
                    accumulate_transposed(total, tile, scaled)
            if bias_total is not None:
                bias_total.addmv_(tile.mT, k)
            del tile  # before the next one is made
        if grad is not None and total is not None and grad.dtype != head.dtype:
            grad[v0:v1] = total
        if bias_grad is not None and bias_total is not None:
            bias_grad[v0:v1] = bias_total
    return grad, bias_grad


def _tile_again(head: Head, h: Tensor, w: Tensor, b: Tensor | None, r: Tensor) -> Tensor:
    """E of some columns times the slope of tanh, the target's column like the others."""
    tile, cap = exponents(head, h, w, b, r)
    tile.exp2_()
    return tile if cap is None else tile.mul_(one_minus_square(cap))


def _run_rows(job: _Pass, h: Tensor, y: Tensor, at_max: bool, store: Tensor | None) -> _Rows:
    """The rows h [k, D] with targets y [k]; fills `store` [k, V] with E if given."""
    head, stats, v = job.head, job.stats, job.head.weight.shape[0]
    w_y = head.matrix(y).to(head.dtype)  # [k, D]
    z_y, flat_y = target_logits(head, h, w_y, y)
    r = row_max(head, h, job.cols) if at_max else z_y
    sums = _Sums.zeros(len(h), z_y)
    grad = torch.zeros(h.shape, dtype=head.dtype, device=h.device) if job.need_grad else None
    for v0, v1 in spans(v, job.cols):
        w, b = head.rows(v0, v1)
        tile, cap = exponents(head, h, w, b, r, None if store is None else store[:, v0:v1])
        _fold(sums, tile, cap, y, v0, job)
        if grad is not None:
            accumulate(head, grad, tile, w)
            if b is not None and job.entropy_by_grad:
                sums.weighted.addmv_(tile, b.clamp(min=LOWEST))
        del tile, cap  # before the next ones are made

    s_o, bits_y = sums.others, z_y - r
    if at_max:  # s_o / s_y may overflow
        logps = -torch.logaddexp(s_o.log() - bits_y * NATS, torch.zeros_like(s_o))
    else:  # s_y = 1
        logps = -torch.log1p(s_o)
    inv_sum = 1 / (s_o + bits_y.exp2())
    if grad is not None and job.entropy_by_grad:
        sums.weighted += (h * grad).sum(1)
        sums.weighted = head.slope * BITS * sums.weighted - r * s_o
    if grad is not None:
        grad.mul_((-head.slope * inv_sum)[:, None])
        grad.addcmul_(w_y, (head.slope * flat_y * s_o * inv_sum)[:, None])
    factor = head.slope * s_o * inv_sum
    if grad is not None and is_factored(head.rounded):
        divide_rows(grad, factor)
    target_e = -s_o * flat_y
    if store is not None:
        store.scatter_(1, y[:, None], target_e[:, None])
    found = {}
    if "entropy" in stats:
        # -sum p log p, with log p_v = (z_v - r) - log(s_o + s_y)
        log_sum = -inv_sum.log() if at_max else -logps
        of_target = bits_y.exp2() * bits_y.clamp(min=-1e4)
        found["entropy"] = log_sum - (sums.weighted + of_target) * (NATS * inv_sum)
    if "mean_logits" in stats:
        if job.mean is not None:
            found["mean_logits"] = head.slope * (h.to(head.dtype) @ job.mean[0] + job.mean[1])
        else:
            assert head.softcap is not None
            found["mean_logits"] = sums.tanh * (head.softcap / head.temperature / v)
    if "is_top1" in stats:
        found["is_top1"] = sums.is_top1
    if "log_sum_sq_probs" in stats:  # p_v = exp(z_v - r) / (s_o + s_y)
        found["log_sum_sq_probs"] = sums.squares.log() + 2 * (sums.top * NATS + inv_sum.log())
    return _Rows(s_o, logps, grad, factor, (r, inv_sum, target_e), found)


def _fold(sums: _Sums, tile: Tensor, cap: Tensor | None, y: Tensor, v0: int, job: _Pass) -> None:
    """Adds a tile of z - r to the sums, and leaves in it E times the slope of tanh."""
    stats, distance = job.stats, None
    if "is_top1" in stats or "log_sum_sq_probs" in stats:
        top, before = tile.amax(1), sums.top
        better = top > before
        sums.top = torch.where(better, top, before)
        if "is_top1" in stats:
            sums.is_top1 &= ~better
            mine = (y >= v0) & (y < v0 + tile.shape[1])
            # A search in all rows takes as long as ten sums; asking which would wait for a GPU.
            some = mine.nonzero().squeeze(1) if tile.device.type == "cpu" else slice(None)
            at = tile[some].argmax(1) + v0
            sums.is_top1[some] |= better[some] & (at == y[some])
        if "log_sum_sq_probs" in stats:
            # Until a logit is finite the top is -inf, and -inf - (-inf) is no number.
            lower, upper = before.clamp(min=LOWEST), sums.top.clamp(min=LOWEST)
            squares = torch.sub(tile, upper[:, None]).mul_(2).exp2_().sum(1)
            sums.squares.mul_((2 * (lower - upper)).exp2()).add_(squares)
    if "entropy" in stats and not job.entropy_by_grad:
        # A masked logit of -inf has E = 0 and must not make 0 * inf.
        distance = tile.clamp(min=-1e4)
    tile.exp2_()
    put_target(tile, y - v0, tile.new_zeros(()).expand(len(y)))
    sums.others += tile.sum(1)
    if distance is not None:
        sums.weighted += distance.mul_(tile).sum(1)
    if cap is not None:
        if "mean_logits" in stats:
            sums.tanh += cap.sum(1)
        tile.mul_(one_minus_square(cap))


def _mean_row(head: Head, cols: int) -> tuple[Tensor, Tensor | float]:
    """Mean row of the weight [D] and mean bias: without a softcap they give the mean logit."""
    v = head.weight.shape[0]
    total = torch.zeros(head.width, dtype=head.dtype, device=head.weight.device)
    for v0, v1 in spans(v, cols):
        total += head.rows(v0, v1)[0].to(head.dtype).sum(0)
    return total / v, 0.0 if head.bias is None else head.bias.to(head.dtype).mean()
