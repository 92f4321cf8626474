"""One tile of logits in torch: the linear head, its logit transform, exponentials, and sizes.

Logits are in bits: z = log2(e) times the logit, so that exponentials are powers of 2. On a CPU
torch.exp2 is cheaper than torch.exp, most of all where they underflow (MKL's leaves its fast path).
What a pass over the tiles computes is in `linear_logps_torch.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .impls import adapter_parts
from .linear_logps_torch_gemm import has_onednn, onednn_product

ROWS, COLS = 1024, 2048  # the largest tile; CPU GEMMs gain nothing from a larger one
BITS, NATS = 1 / math.log(2), math.log(2)  # in a nat; in a bit


@dataclass(frozen=True)
class Head:
    """Weight [V, D], bias [V], and the logit transform of a = h W^T + b.

    With an `adapter` [V, r] the matrix is [W, adapter], joined tile by tile, or [W, adapter,
    adapter] where `hidden` has its product with A in two parts.
    """

    weight: Tensor
    adapter: Tensor | None
    bias: Tensor | None
    softcap: float | None
    scale: float
    temperature: float
    rounded: torch.dtype  # operands are rounded to this dtype, that of `hidden`, ...

    @property
    def dtype(self) -> torch.dtype:
        """... and everything is computed and summed in this one."""
        return torch.promote_types(self.rounded, torch.float32)

    @property
    def width(self) -> int:
        """Columns of hidden: D, or D + r, or D + 2 r."""
        r = 0 if self.adapter is None else self.adapter.shape[1]
        return self.weight.shape[1] + adapter_parts(self.rounded) * r

    @property
    def slope(self) -> float:
        """Of the transform in nat, at a = 0."""
        return self.scale / self.temperature

    @property
    def halves(self) -> bool:
        """Whether GEMMs take 16-bit operands and give fp32. A CPU sums fp32 ones more finely."""
        return self.rounded != self.dtype and self.weight.device.type == "cuda"

    @property
    def tiles(self) -> int:
        """Tiles that a pass without statistics writes to at once."""
        return 1 + (self.softcap is not None)

    def operand(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.rounded)
        return tensor if self.halves else tensor.to(self.dtype)

    def matrix(self, index: Tensor | slice) -> Tensor:
        """Rows of the matrix as a GEMM takes them."""
        rows = self.operand(self.weight[index])
        if self.adapter is None:
            return rows
        adapter = self.operand(self.adapter[index])
        return torch.cat([rows, *[adapter] * adapter_parts(self.rounded)], 1)

    def met(self, h: Tensor) -> Tensor:
        """The columns of `h` that meet what is trained, the weight or the adapter, in `dtype`."""
        if self.adapter is None:
            return h.to(self.dtype)
        d, r = self.weight.shape[1], self.adapter.shape[1]
        first = h[:, d : d + r].to(self.dtype)
        return first if h.shape[1] == d + r else first + h[:, d + r :].to(self.dtype)

    def rows(self, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Matrix [w, D] and bias [w] of some columns of the logits."""
        bias = None if self.bias is None else self.bias[start:end].to(self.dtype)
        return self.matrix(slice(start, end)), bias


def target_logits(head: Head, h: Tensor, w_y: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z_y [k] in bits, and [k] the slope of the transform there, as a share of that at 0."""
    a = (h.to(head.dtype) * w_y).sum(1)
    if head.bias is not None:
        a += head.bias[y].to(head.dtype)
    if head.softcap is None:
        return head.slope * BITS * a, torch.ones_like(a)
    t = torch.tanh(a * (head.scale / head.softcap))
    return t * (head.softcap / head.temperature * BITS), 1 - t * t


def exponents(
    head: Head, h: Tensor, w: Tensor, b: Tensor | None, r: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """z - r in bits [k, w], in `out` if given; and under a softcap its tanh [k, w]."""
    if head.softcap is None:
        return _affine(head, h, w, b, head.slope * BITS, -r[:, None], out), None
    zero = torch.zeros_like(r)[:, None]
    cap = _affine(head, h, w, b, head.scale / head.softcap, zero, None).tanh_()
    tile = torch.mul(cap, head.softcap / head.temperature * BITS, out=out)
    return tile.sub_(r[:, None]), cap


def _affine(
    head: Head,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    factor: float,
    start: Tensor,
    out: Tensor | None,
) -> Tensor:
    """start + factor (h w^T + b) [k, w] of start [k, 1], in `out` if given."""
    if head.halves:
        product = torch.mm(h, w.mT, out_dtype=head.dtype)
        if b is not None:
            product.add_(b)
    else:
        product = onednn_product(h, w, b)
    if product is None:
        out = torch.addmm(start, h, w.mT, alpha=factor, out=out)
        return out if b is None else out.add_(b, alpha=factor)
    return torch.add(start, product, alpha=factor, out=product if out is None else out)


def row_max(head: Head, h: Tensor, cols: int) -> Tensor:
    """max z in bits, [k]: a frame that no row overflows."""
    top = torch.full((h.shape[0],), -math.inf, dtype=head.dtype, device=h.device)
    zero = torch.zeros_like(top)
    for v0, v1 in spans(head.weight.shape[0], cols):
        top = torch.maximum(top, exponents(head, h, *head.rows(v0, v1), zero)[0].amax(1))
    return top


def accumulate(head: Head, grad: Tensor, e: Tensor, w: Tensor) -> None:
    """grad += E @ w, summed in fp32. On a GPU, where E <= 1, a 16-bit w meets E in its dtype."""
    if not head.halves:
        product = onednn_product(e, w.mT)
        if product is None:
            grad.addmm_(e, w)
        else:
            grad.add_(product)
    elif head.rounded == torch.float16:  # whose range ends at 2^-24: each row's largest E is 2^14
        top = e.amax(1, keepdim=True).clamp_(min=2.0**-100)
        product = torch.mm((e * (2.0**14 / top)).half(), w, out_dtype=head.dtype)
        grad.add_(product.mul_(top), alpha=2.0**-14)
    else:
        grad.add_(torch.mm(e.to(head.rounded), w, out_dtype=head.dtype))


def divide_rows(grad: Tensor, factor: Tensor) -> None:
    """grad [k, D] / factor [k] in place. Where a factor is 0 so is its row, and stays it."""
    grad.div_(factor.masked_fill(factor == 0, 1)[:, None])


def accumulate_transposed(total: Tensor, e: Tensor, h: Tensor) -> None:
    """total [w, D] += e^T @ h of e [k, w] and h [k, D], in their dtype."""
    if has_onednn(e.device, e.dtype):
        e = e.contiguous()
    product = onednn_product(h.mT, e.mT)  # [D, w]: this way round, no tile is transposed
    if product is None:
        total.addmm_(e.mT, h)
    else:
        total.add_(product.mT)


def put_target(tile: Tensor, column: Tensor, value: Tensor) -> None:
    """Writes value [k] at each row's column [k], where the tile holds that column."""
    width = tile.shape[1]
    inside = (column >= 0) & (column < width)
    column = column.clamp(0, width - 1)[:, None]
    old = tile.gather(1, column)
    tile.scatter_(1, column, torch.where(inside[:, None], value[:, None], old))


def one_minus_square(t: Tensor) -> Tensor:
    """1 - t^2, in place."""
    return t.square_().neg_().add_(1)


def spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)


def may_keep(head: Head, n: int, budget: int, tiles: int) -> bool:
    """Whether all of E [n, V] fits the budget, with a tile beside it that isn't slow for its size,
    or a row of E and one of logits."""
    v = head.weight.shape[0]
    row = v * head.dtype.itemsize
    beside = max(tile_bytes(head, min(n, 256), min(v, 1024), tiles), 2 * row)
    return n * row + beside <= budget


def tile_shape(head: Head, n: int, budget: int, tiles: int) -> tuple[int, int]:
    """The largest tile up to ROWS x COLS that fits the budget with the copies made beside it.

    Raises ValueError if not even a small one does.
    """
    v, d = head.weight.shape[0], head.width
    least_rows, least_cols = max(min(n, 8), 1), min(v, 128)
    rows, cols = max(min(n, ROWS), 1), min(v, COLS)
    while tile_bytes(head, rows, cols, tiles) > budget:
        if (rows, cols) == (least_rows, least_cols):
            need = tile_bytes(head, rows, cols, tiles)
            raise ValueError(
                f"linear_logps: workspace_bytes leaves {budget} bytes for a tile, but D={d}, V={v} "
                f"need {need}; raise workspace_bytes"
            )
        if cols == least_cols or (rows > least_rows and rows >= cols // 4):
            rows = max(rows // 2, least_rows)
        else:
            cols = max(cols // 2, least_cols)
    return rows, cols


def tile_bytes(head: Head, rows: int, cols: int, tiles: int) -> int:
    """Tiles (two more for a 16-bit GEMM's operands; of a kept E, which is no tile, a part as
    oneDNN's operand), and beside them: h twice, W[y], their product and the gradient; W twice and
    its gradient, unless as they are, and oneDNN's result of that."""
    d = head.width
    apart = has_onednn(head.weight.device, head.dtype)
    tiles = max(tiles, apart) + 2 * head.halves
    as_it_is = head.adapter is None and head.weight.dtype == head.rounded == head.dtype
    copies = (0 if as_it_is else 3) + apart
    return head.dtype.itemsize * (tiles * rows * cols + 5 * rows * d + copies * cols * d)
