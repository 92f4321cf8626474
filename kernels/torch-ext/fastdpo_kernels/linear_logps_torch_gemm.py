"""Products of fp32 matrices in IEEE precision, on a CPU by the faster of torch's two libraries.

On x86 torch.mm is MKL's. Where there is AVX-512, oneDNN's product of large matrices was the faster
one on an AMD Zen 4, with torch 2.11 to 2.13; elsewhere this is unmeasured (the benchmark's row
"gemms" is the fastest of both). Torch has it behind a fused linear layer. What is used depends on
shapes, strides and settings, never on a measurement: every process gets the same bits.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LEAST = 2**25  # multiplications; smaller products take as long with either, or longer with oneDNN
_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor Y"
)


@functools.cache
def _linear() -> Callable[..., Tensor] | None:
    """The op that is oneDNN's X W^T, if this torch has it as it is called here."""
    if not torch.backends.mkldnn.is_available():
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return op if str(op._schema) == _SCHEMA else None


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `onednn_product` may give a product of such matrices."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and _linear() is not None
    )


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """a [m, k] @ b.T of b [n, k], plus a bias [n]: a new tensor; None where torch.mm is to do it.

    `b` or its transpose must be contiguous, or oneDNN would go a slow way; of an `a` that is not,
    it makes a copy.
    """
    linear = _linear()
    if linear is None or not has_onednn(a.device, a.dtype) or b.dtype != a.dtype:
        return None
    if len(a) * b.numel() < LEAST or not (b.is_contiguous() or b.mT.is_contiguous()):
        return None
    if type(a) is not Tensor or type(b) is not Tensor:  # fake ones, and others that have no storage
        return None
    return linear(a, b, bias, "none", [], "")


@contextlib.contextmanager
def ieee_matmul(device: torch.device) -> Iterator[None]:
    """Keeps TF32 and bf16 out of products of fp32, which torch's settings may allow."""
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    matmul = backend.matmul
    precision = matmul.fp32_precision
    if precision in ("ieee", "none"):
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"  # then it is that of a wider setting, ...
        if matmul.fp32_precision != precision:  # ... unless it had its own
            matmul.fp32_precision = precision
