"""Triton: what the kernels of `linear_logps` share: constants, logits, and the head's matrix.

The mathematics is that of `reference.py`; here is how its parts are held and computed on a GPU.
"""

# Triton's language is Python in syntax alone: checkers know neither its arguments nor its tensors.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# E = 2^min((z - z_y) log2(e) - OFFSET, CLAMP): the target's own exponential is exactly 2^-OFFSET.
# A row whose sum reaches FLAG may have met the clamp (some z - z_y > 99.8, so logp < -99.8); the
# exact kernels do it again. At the clamp 2^18 columns sum to 2^104.5: neither the sums nor E @ W
# come near overflow (2^127).
OFFSET: tl.constexpr = tl.constexpr(58.0)
CLAMP: tl.constexpr = tl.constexpr(86.5)
FLAG: tl.constexpr = tl.constexpr(7.737125245533627e25)  # 2^86
TARGET_E: tl.constexpr = tl.constexpr(3.469446951953614e-18)  # 2^-OFFSET

# Fields of a tile's partial results, [field, tile, row]; without statistics only the first exists.
SUM_E: tl.constexpr = tl.constexpr(0)  # sum of e, target excluded
SUM_ED: tl.constexpr = tl.constexpr(1)  # sum of e (z - z_y)
SUM_Z: tl.constexpr = tl.constexpr(2)  # sum of z
MAX_Z: tl.constexpr = tl.constexpr(3)  # largest z, target included
ARGMAX: tl.constexpr = tl.constexpr(4)  # its first column (bits of an int32)
SUM_SQ: tl.constexpr = tl.constexpr(5)  # sum of exp(2 (z - MAX_Z))

# A logit of -inf (a masked bias) has e = 0; its distance is cut here so that 0 * inf never happens.
LOWEST: tl.constexpr = tl.constexpr(-1e4)

# Arguments that change from call to call and must not compile a kernel anew (1, divisible by 16).
CALL_INTS = [
    "n_rows", "first_col", "end_col", "first_tile", "n_tiles", "n_splits", "group", "ignore_index",
]  # fmt: skip
# ptxas saves registers in some kernels for more warps in flight, and some versions then need a
# stack frame for the last few; allowed all of them, they don't.
MOST_REGISTERS = 255
# Said for every launch: Triton 3.9 warns that its default will change.
FUSE = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Matrix:
    """What hidden [N, d] is multiplied with: W [V, D], or [W, adapter] [V, D + r], or [W, adapter,
    adapter] for `parts` of 2.

    Rows of the adapter are contiguous.
    """

    weight: Tensor
    adapter: Tensor | None
    parts: int

    @property
    def v(self) -> int:
        return self.weight.shape[0]

    @property
    def trained(self) -> Tensor:
        """The part that may get a gradient."""
        return self.weight if self.adapter is None else self.adapter

    @property
    def pointers(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.adapter

    @property
    def layout(self) -> tuple[int, int, int, int, int]:
        """d_weight, d_adapter, stride_weight, stride_weight_k, stride_adapter of a kernel."""
        row, column = self.weight.stride()
        r, stride = (
            (0, 0) if self.adapter is None else (self.adapter.shape[1], self.adapter.stride(0))
        )
        return self.weight.shape[1], r, row, column, stride

    def met(self, hidden: Tensor) -> Tensor:
        """The columns of hidden that meet `trained`, `parts` times as many."""
        return hidden if self.adapter is None else hidden[:, self.weight.shape[1] :]


@dataclass(frozen=True)
class Logits:
    """z of a raw product a: (a + bias) * scale, or cap * tanh((a + bias) * scale) if `softcap`.

    `scale` and `cap` already hold the temperature; `slope` is dz/da at a = 0.
    """

    bias: Tensor | None
    scale: float
    cap: float
    slope: float
    softcap: bool

    @staticmethod
    def of(
        bias: Tensor | None, softcap: float | None, scale: float, temperature: float
    ) -> "Logits":
        slope = scale / temperature
        bias = None if bias is None else bias.contiguous()
        if softcap is None:
            return Logits(bias, slope, 1.0, slope, False)
        return Logits(bias, scale / softcap, softcap / temperature, slope, True)


@triton.jit
def _tanh(x):
    # Cephes' single-precision split: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
    s = x * x
    poly = -5.70498872745e-3 * s + 2.06390887954e-2
    poly = poly * s - 5.37397155531e-2
    poly = poly * s + 1.33314422036e-1
    poly = poly * s - 3.33332819422e-1
    a = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    return tl.where(a < 0.625, x + x * s * poly, tl.where(x < 0, -large, large))


@triton.jit
def logit(raw, logit_scale, cap, SOFTCAP: tl.constexpr):
    """z, and dz/da as a share of its value at a = 0 (see `Logits`)."""
    z = raw * logit_scale
    slope = 1.0
    if SOFTCAP:
        t = _tanh(z)
        z = t * cap
        slope = 1.0 - t * t
    return z, slope


@triton.jit
def slope_at(z, cap, SOFTCAP: tl.constexpr):
    slope = 1.0
    if SOFTCAP:
        t = z / cap
        slope = 1.0 - t * t
    return slope


@triton.jit
def matrix_at(
    weight_ptr, adapter_ptr, rows, ks, mask, d_weight, d_adapter,
    stride_weight, stride_weight_k, stride_adapter, dtype: tl.constexpr,
):  # fmt: skip
    """[W, adapter] at `rows` x `ks`, int64 rows, in this dtype; 0 outside the mask.

    W has `d_weight` columns, and all of them where there is no adapter; that has `d_adapter`, once
    or twice.
    """
    inside = mask
    if adapter_ptr is not None:
        inside = mask & (ks < d_weight)
    at = weight_ptr + rows * stride_weight + ks.to(tl.int64) * stride_weight_k
    w = tl.load(at, mask=inside, other=0.0)
    w = w.to(dtype)
    if adapter_ptr is not None:
        column = ks - d_weight
        column = tl.where(column < d_adapter, column, column - d_adapter)
        at = adapter_ptr + rows * stride_adapter + column
        w += tl.load(at, mask=mask & (ks >= d_weight), other=0.0).to(dtype)
    return w
