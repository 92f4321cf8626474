"""`linear_logps` in chunked torch: the fast path on CPU, and the way where Triton cannot run.

Per row, in a frame r: E_v = exp(z_v - r) for v != y, s_o = sum_v E_v, s_y = exp(z_y - r), and then
    logp = -log(1 + s_o / s_y)        d_hidden = (s_o W[y] - E @ W) / (s_o + s_y)
(times the logit transform's slope). On a CPU r = z_y, known before the first tile, so nothing is
ever rescaled; the rare rows that overflow this frame are done again with r near max z. Elsewhere
all rows use that second frame (one more GEMM): asking which overflowed would wait for the device.
Callers have checked the arguments.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .impls import ForwardResult, TokenStats

_OVERFLOW = math.exp(80.0)  # of s_o in the frame r = z_y: logp < -80, and exp is near its end
_HEADROOM = 10.0  # max z - r in the other frame, so that E spans the range of fp16 too
_ROWS, _COLS = 1024, 4096  # the largest tile


@dataclass(frozen=True)
class _Head:
    """Weight [V, D], bias [V], and the logit transform z(a) of a = h W^T + b."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    temperature: float
    rounded: torch.dtype  # operands are rounded to this dtype, that of `hidden`, ...
    dtype: torch.dtype  # ... and everything is computed and summed in this one

    @property
    def slope(self) -> float:
        """dz/da at a = 0."""
        return self.scale / self.temperature

    @property
    def halves(self) -> bool:
        """Whether GEMMs take 16-bit operands and give fp32. CPUs are faster and finer in fp32."""
        return self.rounded != self.dtype and self.weight.device.type == "cuda"

    def operand(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.rounded)
        return tensor if self.halves else tensor.to(self.dtype)

    def bias_slice(self, start: int, end: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:end].to(self.dtype)


@dataclass
class _Sums:
    """What a pass over the vocabulary gathers about k rows."""

    others: Tensor  # [k] sum of E over v != y
    weighted: Tensor  # [k] sum of E (z - center): the entropy
    tanh: Tensor  # [k] sum of tanh under a softcap: the mean logit
    top: Tensor  # [k] largest z - r so far, ...
    top_at: Tensor  # [k] ... its first column, ...
    squares: Tensor  # [k] ... and the sum of exp(2 (z - r - top)), target included

    @staticmethod
    def zeros(rows: int, like: Tensor) -> "_Sums":
        zero = [like.new_zeros(rows) for _ in range(4)]
        top = like.new_full((rows,), -math.inf)
        at = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return _Sums(zero[0], zero[1], zero[2], top, at, zero[3])


@dataclass(frozen=True)
class _Chunk:
    """Finished rows: their sum of E, and what `forward` stores of them."""

    others: Tensor
    logps: Tensor
    grad: Tensor | None
    saved: tuple[
        Tensor, ...
    ]  # r, 1 / (s_o + s_y), and the value that stands for E at the target in dW
    stats: dict[str, Tensor] = field(default_factory=dict)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden_grad: bool,
    need_weight_grad: bool,
    workspace_bytes: int,
) -> ForwardResult:
    """`hidden` [N, D], `weight` [V, D], `targets` [N]; see `impls.ForwardResult`."""
    (n, d), v = hidden.shape, weight.shape[0]
    head = _head(hidden, weight, bias, softcap, scale, temperature)
    fixed = hidden.device.type == "cpu"
    ignored = targets == ignore_index
    wide = {"dtype": head.dtype, "device": hidden.device}

    logps = torch.empty(n, **wide)
    hidden_grad = torch.empty(n, d, dtype=hidden.dtype, device=hidden.device)
    saved = [torch.empty(n, **wide) for _ in range(3)]
    found = {
        name: torch.empty(n, **{**wide, "dtype": torch.bool} if name == "is_top1" else wide)
        for name in stats
    }
    tiles = 1 + (softcap is not None) + bool(stats)
    kept_bytes = n * v * head.dtype.itemsize if need_weight_grad else 0
    if kept_bytes + _tile_bytes(min(n, _ROWS), min(v, _COLS), d, head, tiles) > workspace_bytes:
        kept_bytes = 0
    kept = torch.empty(n, v, **wide) if kept_bytes else None
    rows, cols = _tile_shape(n, v, d, head, workspace_bytes - kept_bytes, tiles)
    buffer = torch.empty(tiles, rows * cols, **wide)
    mean = _mean_logit_row(head, cols) if "mean_logits" in stats and softcap is None else None

    def run(index: Tensor | slice, near_max: bool) -> Tensor:
        skip = ignored[index]
        y = targets[index].masked_fill(skip, 0)
        h = head.operand(hidden[index]).masked_fill(skip[:, None], 0)
        store = None if kept is None else kept[index]
        done = _run_rows(head, h, y, store, buffer, cols, stats, need_hidden_grad, near_max, mean)
        logps[index] = done.logps.masked_fill(skip, 0)
        if done.grad is not None:
            hidden_grad[index] = done.grad.masked_fill_(skip[:, None], 0).to(hidden.dtype)
        for whole, part in zip(saved, done.saved, strict=True):
            whole[index] = part
        for name, part in done.stats.items():
            found[name][index] = part.masked_fill(skip, 0)
        if kept is not None and store is not None and not isinstance(index, slice):
            kept[index] = store  # it was a copy
        return done.others

    for start, end in _spans(n, rows):
        others = run(slice(start, end), near_max=not fixed)
        if fixed:
            overflow = ~(
                others < _OVERFLOW
            )  # NaN too: the other frame shows whether it is the row's own
            if overflow.any():
                run(start + overflow.nonzero().squeeze(1), near_max=True)
    return ForwardResult(
        token_logps=logps,
        hidden_grad=hidden_grad if need_hidden_grad else None,
        saved=(*saved, *(() if kept is None else (kept,))) if need_weight_grad else (),
        stats=TokenStats(**found) if stats else None,
    )


def weight_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    saved: tuple[Tensor, ...],
    grad_logps: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """dW [V, D] and db [V] (None if not asked for), in the dtypes of the weight and the bias.

    dW = -slope E^T @ (g / (s_o + s_y) H), where E holds -s_o (times its tanh slope) at the target.
    E comes from `saved` if forward could keep it, otherwise each tile is computed again; each row
    of dW is written once.
    """
    frame, inv_sum, target_e, *kept = saved
    (n, d), v = hidden.shape, weight.shape[0]
    head = _head(hidden, weight, bias, softcap, scale, temperature)
    ignored = targets == ignore_index
    factor = (-head.slope * grad_logps.to(head.dtype) * inv_sum).masked_fill(ignored, 0)  # [N]

    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    bias_grad = None if bias is None or not need_bias_grad else torch.empty_like(bias)
    in_place = weight.dtype == head.dtype
    tiles = 1 + (softcap is not None)
    rows, cols = _tile_shape(n, v, d, head, workspace_bytes, tiles)
    buffer = torch.empty(tiles, rows * cols, dtype=head.dtype, device=hidden.device)
    for v0, v1 in _spans(v, cols):
        w = head.operand(weight[v0:v1])
        b = head.bias_slice(v0, v1)
        total = (
            grad[v0:v1] if in_place else torch.empty(v1 - v0, d, dtype=head.dtype, device=w.device)
        )
        total.zero_()
        bias_total = total.new_zeros(v1 - v0)
        for r0, r1 in _spans(n, rows):
            skip = ignored[r0:r1, None]
            h = head.operand(hidden[r0:r1]).masked_fill(skip, 0)
            if kept:
                tile = kept[0][r0:r1, v0:v1]
            else:
                tile, *rest = _tiles(buffer, r1 - r0, v1 - v0)
                cap = rest[0] if rest else None
                _exponents(head, h, w, b, frame[r0:r1], tile, cap)
                tile.exp_()
                if cap is not None:
                    tile.mul_(_one_minus_square(cap))
                y = targets[r0:r1].masked_fill(skip.squeeze(1), 0)
                _put_target(tile, y - v0, target_e[r0:r1])
            k = factor[r0:r1]
            scaled = h.to(head.dtype).mul(k[:, None])
            if head.halves and head.rounded == torch.bfloat16:
                _accumulate(head, total, tile.mT, scaled.to(head.rounded))
            else:  # fp16 has no room for small gradients: fp32
                total.addmm_(tile.mT, scaled)
            if bias_grad is not None:
                bias_total.addmv_(tile.mT, k)
        if not in_place:
            grad[v0:v1] = total
        if bias_grad is not None:
            bias_grad[v0:v1] = bias_total
    return grad, bias_grad


def _run_rows(
    head: _Head,
    h: Tensor,
    y: Tensor,
    store: Tensor | None,
    buffer: Tensor,
    cols: int,
    stats: tuple[str, ...],
    need_grad: bool,
    near_max: bool,
    mean: tuple[Tensor, Tensor | float] | None,
) -> _Chunk:
    """The rows h [k, D] with targets y [k]; fills `store` [k, V] with E if given."""
    rows, v = h.shape[0], head.weight.shape[0]
    w_y = head.operand(head.weight[y]).to(head.dtype)  # [k, D]
    z_y, flat_y = _target_logits(head, h, w_y, y)
    r = _near_max(head, h, buffer, cols) if near_max else z_y
    center = r + _HEADROOM if near_max else z_y
    sums = _Sums.zeros(rows, z_y)
    grad = torch.zeros(h.shape, dtype=head.dtype, device=h.device) if need_grad else None
    for v0, v1 in _spans(v, cols):
        w = head.operand(head.weight[v0:v1])
        tile, *rest = _tiles(buffer, rows, v1 - v0)
        cap = rest.pop(0) if head.softcap is not None else None
        if store is not None:
            tile = store[:, v0:v1]
        _exponents(head, h, w, head.bias_slice(v0, v1), r, tile, cap)
        _fold(sums, tile, cap, rest[0] if rest else None, y, v0, r - center, stats)
        if grad is not None:
            _accumulate(head, grad, tile, w)

    s_o, log_sy = sums.others, z_y - r
    if near_max:  # s_o / s_y may overflow
        logps = -torch.logaddexp(s_o.log() - log_sy, torch.zeros_like(s_o))
    else:  # s_y = 1
        logps = -torch.log1p(s_o)
    inv_sum = 1 / (s_o + log_sy.exp())
    if grad is not None:
        grad.mul_((-head.slope * inv_sum)[:, None])
        grad.addcmul_(w_y, (head.slope * flat_y * s_o * inv_sum)[:, None])
    target_e = -s_o * flat_y
    if store is not None:
        store.scatter_(1, y[:, None], target_e[:, None])
    found = {}
    if "entropy" in stats:
        # -sum p log p with log p_v = (z_v - c) - (log sum - c), c near what carries the weight
        spread = -inv_sum.log() - _HEADROOM if near_max else -logps
        of_target = log_sy.exp() * (z_y - center)
        found["entropy"] = spread - (sums.weighted + of_target) * inv_sum
    if "mean_logits" in stats and mean is not None:
        found["mean_logits"] = head.slope * (h.to(head.dtype) @ mean[0] + mean[1])
    elif "mean_logits" in stats and head.softcap is not None:
        found["mean_logits"] = sums.tanh * (head.softcap / head.temperature / v)
    if "is_top1" in stats:
        found["is_top1"] = sums.top_at == y
    if "log_sum_sq_probs" in stats:  # p_v = exp(z_v - r) / (s_o + s_y)
        found["log_sum_sq_probs"] = sums.squares.log() + 2 * (sums.top + inv_sum.log())
    return _Chunk(s_o, logps, grad, (r, inv_sum, target_e), found)


def _exponents(
    head: _Head, h: Tensor, w: Tensor, b: Tensor | None, r: Tensor, tile: Tensor, cap: Tensor | None
) -> None:
    """tile [k, w] = z - r; under a softcap, `cap` [k, w] gets the tanh."""
    if cap is None:
        if b is None:
            tile.copy_(-r[:, None])
        else:
            torch.sub((head.slope * b)[None, :], r[:, None], out=tile)
        _add_product(head, tile, h, w, head.slope)
        return
    assert head.softcap is not None
    inner = head.scale / head.softcap
    if b is None:
        cap.zero_()
    else:
        cap.copy_(inner * b)
    _add_product(head, cap, h, w, inner)
    cap.tanh_()
    torch.mul(cap, head.softcap / head.temperature, out=tile)
    tile.sub_(r[:, None])


def _fold(
    sums: _Sums,
    tile: Tensor,
    cap: Tensor | None,
    scratch: Tensor | None,
    y: Tensor,
    v0: int,
    to_center: Tensor,
    stats: tuple[str, ...],
) -> None:
    """Adds a tile of z - r to the sums, and leaves in it E times the slope of tanh."""
    if "is_top1" in stats or "log_sum_sq_probs" in stats:
        top, at = tile.max(dim=1)
        better = top > sums.top
        before = sums.top
        sums.top = torch.where(better, top, before)
        sums.top_at = torch.where(better, at + v0, sums.top_at)
        if "log_sum_sq_probs" in stats:
            assert scratch is not None
            torch.sub(tile, sums.top[:, None], out=scratch)
            squares = scratch.mul_(2).exp_().sum(1)
            sums.squares.mul_((2 * (before - sums.top)).exp()).add_(squares)
    if "entropy" in stats:
        assert scratch is not None
        # A masked logit of -inf has E = 0 and must not make 0 * inf.
        torch.add(tile, to_center[:, None], out=scratch).clamp_(min=-1e4)
    tile.exp_()
    _put_target(tile, y - v0, tile.new_zeros(()).expand(len(y)))
    sums.others += tile.sum(1)
    if "entropy" in stats:
        assert scratch is not None
        sums.weighted += scratch.mul_(tile).sum(1)
    if cap is not None:
        if "mean_logits" in stats:
            sums.tanh += cap.sum(1)
        tile.mul_(_one_minus_square(cap))


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
) -> _Head:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return _Head(weight, bias, softcap, scale, temperature, hidden.dtype, dtype)


def _target_logits(head: _Head, h: Tensor, w_y: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z_y [k], and [k] the slope of the transform there, as a share of the slope at 0."""
    a = (h.to(head.dtype) * w_y).sum(1)
    if head.bias is not None:
        a += head.bias[y].to(head.dtype)
    if head.softcap is None:
        return head.slope * a, torch.ones_like(a)
    t = torch.tanh(a * (head.scale / head.softcap))
    return t * (head.softcap / head.temperature), 1 - t * t


def _near_max(head: _Head, h: Tensor, buffer: Tensor, cols: int) -> Tensor:
    """max z - headroom, [k]: a frame in which no row overflows."""
    r = torch.full((h.shape[0],), -math.inf, dtype=head.dtype, device=h.device)
    zero = torch.zeros_like(r)
    for v0, v1 in _spans(head.weight.shape[0], cols):
        tile, *rest = _tiles(buffer, h.shape[0], v1 - v0)
        cap = rest[0] if head.softcap is not None else None
        w = head.operand(head.weight[v0:v1])
        _exponents(head, h, w, head.bias_slice(v0, v1), zero, tile, cap)
        r = torch.maximum(r, tile.amax(1))
    return r - _HEADROOM


def _mean_logit_row(head: _Head, cols: int) -> tuple[Tensor, Tensor | float]:
    """Mean row of the weight [D], mean bias: without a softcap they give the mean logit."""
    v, d = head.weight.shape
    total = torch.zeros(d, dtype=head.dtype, device=head.weight.device)
    for v0, v1 in _spans(v, cols):
        total += head.operand(head.weight[v0:v1]).to(head.dtype).sum(0)
    return total / v, 0.0 if head.bias is None else head.bias.to(head.dtype).mean()


def _add_product(head: _Head, tile: Tensor, h: Tensor, w: Tensor, factor: float) -> None:
    """tile [k, w] += factor h w^T."""
    if head.halves:
        tile.add_(torch.mm(h, w.mT, out_dtype=head.dtype), alpha=factor)
    else:
        tile.addmm_(h, w.mT, alpha=factor)


def _accumulate(head: _Head, grad: Tensor, e: Tensor, w: Tensor) -> None:
    """grad += E @ w, in fp32."""
    if head.halves:
        grad += torch.mm(e.to(head.rounded), w, out_dtype=head.dtype)
    else:
        grad.addmm_(e, w)


def _put_target(tile: Tensor, column: Tensor, value: Tensor) -> None:
    """Writes value [k] at each row's column [k], where the tile holds that column."""
    width = tile.shape[1]
    inside = (column >= 0) & (column < width)
    column = column.clamp(0, width - 1)[:, None]
    old = tile.gather(1, column)
    tile.scatter_(1, column, torch.where(inside[:, None], value[:, None], old))


def _one_minus_square(t: Tensor) -> Tensor:
    """1 - t^2, in place."""
    return t.square_().neg_().add_(1)


def _spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _tiles(buffer: Tensor, rows: int, cols: int) -> list[Tensor]:
    """Contiguous tiles [rows, cols], one in each row of the buffer."""
    return [row[: rows * cols].view(rows, cols) for row in buffer]


def _tile_shape(n: int, v: int, d: int, head: _Head, budget: int, tiles: int) -> tuple[int, int]:
    """The largest tile up to _ROWS x _COLS that fits the budget with the copies made beside it.

    Raises ValueError if not even a small one does.
    """
    least_rows, least_cols = max(min(n, 8), 1), min(v, 128)
    rows, cols = max(min(n, _ROWS), 1), min(v, _COLS)
    while _tile_bytes(rows, cols, d, head, tiles) > budget:
        if (rows, cols) == (least_rows, least_cols):
            raise ValueError(
                f"linear_logps: workspace_bytes leaves {budget} bytes for a tile, but D={d}, V={v} "
                f"need {_tile_bytes(rows, cols, d, head, tiles)}; raise workspace_bytes"
            )
        if cols == least_cols or (rows > least_rows and rows >= cols // 4):
            rows = max(rows // 2, least_rows)
        else:
            cols = max(cols // 2, least_cols)
    return rows, cols


def _tile_bytes(rows: int, cols: int, d: int, head: _Head, tiles: int) -> int:
    # tiles; h twice, W[y], their product, the gradient; W twice, its gradient
    return head.dtype.itemsize * (tiles * rows * cols + 5 * rows * d + 3 * cols * d)
