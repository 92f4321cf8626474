"""A call of `linear_logps`: its arguments checked, and the implementation that was chosen.

What both ways to call it share, eager (`linear_logps.py`) and compiled (`linear_logps_graph.py`).
"""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_int64, check_number, check_plain, check_range, quotient
from .impls import (
    STATS,
    ForwardResult,
    choose_impl,
    is_factored,
    is_transformed,
    log_choice,
)
from .linear_logps_eager import is_tiny
from .linear_logps_torch_gemm import ieee_matmul

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Lora = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Call:
    """What is to be computed, and by which implementation.

    `rounded`: the dtype that operands are multiplied in; implementations round `hidden` and
    `weight` to it part by part. `need_weight_grad`: of the adapter
    [V, r] where there is one.
    """

    impl: str
    rounded: torch.dtype
    softcap: float | None
    scale: float
    temperature: float
    ignore_index: int
    stats: tuple[str, ...]
    workspace_bytes: int
    need_hidden_grad: bool
    need_weight_grad: bool
    need_bias_grad: bool

    def chosen(
        self, hidden: Tensor, weight: Tensor, adapter: Tensor | None, *, tiny: bool
    ) -> "Call":
        """The call with "auto" resolved, to "eager" only if `tiny` problems may go there.

        Raises if what was asked for cannot run.
        """
        if self.impl == "auto" and tiny:
            joined, space = adapter is not None, self.workspace_bytes
            if is_tiny(hidden, weight, self.rounded, joined=joined, workspace_bytes=space):
                log_choice("linear_logps", "eager", hidden.device, "a small head", self.rounded)
                return dataclasses.replace(self, impl="eager")
        impl = choose_impl("linear_logps", self.impl, hidden.device, self.rounded, weight.dtype)
        return dataclasses.replace(self, impl=impl)

    @property
    def need_hidden_factor(self) -> bool:
        return self.need_hidden_grad and is_factored(self.rounded)

    @property
    def need_head_grad(self) -> bool:
        return self.need_weight_grad or self.need_bias_grad

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        adapter: Tensor | None,
        *,
        keep: bool,
    ) -> ForwardResult:
        """`keep`: the exponentials may stay for `weight_grad`, where the workspace has room."""
        with undisturbed(hidden.device):
            return self._module.forward(
                hidden.detach(),
                weight.detach(),
                targets,
                rounded=self.rounded,
                adapter=_detach(adapter),
                bias=_detach(bias),
                **self._transform,
                stats=self.stats,
                need_hidden_grad=self.need_hidden_grad,
                need_weight_grad=self.need_weight_grad,
                need_bias_grad=self.need_bias_grad,
                keep=keep,
                workspace_bytes=self.workspace_bytes,
            )

    def weight_grad(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        adapter: Tensor | None,
        saved: tuple[Tensor, ...],
        grad_logps: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dW [V, D], or the adapter's [V, r], and db [V]; None for what was not asked for."""
        with undisturbed(hidden.device):
            return self._module.weight_grad(
                hidden.detach(),
                weight.detach(),
                targets,
                saved,
                grad_logps.detach(),
                rounded=self.rounded,
                adapter=_detach(adapter),
                bias=_detach(bias),
                **self._transform,
                workspace_bytes=self.workspace_bytes,
                need_weight_grad=self.need_weight_grad,
                need_bias_grad=self.need_bias_grad,
            )

    @property
    def _module(self) -> Any:
        return importlib.import_module(f".linear_logps_{self.impl}", __package__)

    @property
    def _transform(self) -> dict[str, Any]:
        return {
            "softcap": self.softcap,
            "scale": self.scale,
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
        }


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no fp32 products in a lower precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), ieee_matmul(device):
        yield


def scale_rows(rows: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [N, D] * factor [N], rounded once to `dtype`, without a wider copy of the whole."""
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    # GPUs convert element by element; CPUs make copies first, so give them little at a time.
    step = max(1, len(rows) if rows.is_cuda else 2**18 // rows.shape[1])
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        torch.mul(rows[some], factor[some, None], out=out[some])
    return out


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    workspace_bytes: int,
) -> None:
    """Raises TypeError or ValueError, naming both sides, for arguments that do not fit."""
    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        tensors["bias"] = bias
    if lora is not None:
        if not isinstance(lora, (tuple, list)):
            kind = type(lora).__name__
            raise TypeError(f"linear_logps: lora must be a tuple (A, B, scaling), got {kind}")
        if len(lora) != 3:
            raise ValueError(f"linear_logps: lora must be (A, B, scaling), got {len(lora)} values")
        tensors |= {"lora's A": lora[0], "lora's B": lora[1]}
    for name, tensor in tensors.items():
        check_plain("linear_logps", name, tensor)
        if not torch.compiler.is_compiling() and is_transformed(tensor):
            raise RuntimeError(TRANSFORMED)
    dims = {"targets": 1, "bias": 1}
    for name, tensor in tensors.items():
        if tensor.ndim != dims.get(name, 2):
            shape = tuple(tensor.shape)
            raise ValueError(
                f"linear_logps: {name} must have {dims.get(name, 2)} dimension(s), got {shape}"
            )
    (n, d), (v, weight_d) = hidden.shape, weight.shape
    if d != weight_d:
        raise ValueError(f"linear_logps: expected D={weight_d} (weight), got {d} (hidden)")
    if max(n, d, v) >= 2**31:
        raise ValueError(
            f"linear_logps: N={n}, D={d}, V={v}, but a dimension holds fewer than 2^31={2**31} "
            "(int32 indices); of hidden's rows, give some at a time"
        )
    if v == 0 or d == 0:
        raise ValueError(f"linear_logps: weight is empty: {tuple(weight.shape)}")
    if len(targets) != n:
        raise ValueError(f"linear_logps: expected {n} targets (rows of hidden), got {len(targets)}")
    if bias is not None and len(bias) != v:
        raise ValueError(f"linear_logps: expected {v} biases (rows of weight), got {len(bias)}")
    if lora is not None:
        _check_lora(lora, weight)
    for name, tensor in tensors.items():
        if name == "targets":
            if tensor.dtype != torch.int64:
                raise TypeError(f"linear_logps: targets must be int64, got {tensor.dtype}")
        elif tensor.dtype not in _FLOATS:
            raise TypeError(
                f"linear_logps: {name} is {tensor.dtype}; expected float64, float32, float16 or "
                "bfloat16 (dequantize a quantized head first)"
            )
        elif name != "bias" and (hidden.dtype == torch.float64) != (tensor.dtype == torch.float64):
            raise TypeError(
                f"linear_logps: float64 mixes with nothing else: hidden is {hidden.dtype}, "
                f"{name} {tensor.dtype}; cast one to the other's"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"linear_logps: {name} is on {tensor.device}, hidden on {hidden.device}; "
                "move one to the other's device"
            )
    _check_transform(softcap, scale, temperature, hidden.dtype)
    check_int64("linear_logps", "ignore_index", ignore_index, "write ignore_index=-100")
    for name in stats:
        if name not in STATS:
            raise ValueError(
                f"linear_logps: no statistic is called {name!r}; expected {', '.join(STATS)}"
            )
    if len(set(stats)) != len(stats):
        raise ValueError(f"linear_logps: stats names one twice: {', '.join(stats)}")
    way = "write workspace_bytes=256 * 2**20"
    check_number("linear_logps", "workspace_bytes", workspace_bytes, way)
    if not 1 <= workspace_bytes < 2**63:
        raise ValueError(
            f"linear_logps: workspace_bytes must be at least 1 and below 2^63, got "
            f"{workspace_bytes}; {way}"
        )


def _check_transform(
    softcap: float | None, scale: float, temperature: float, dtype: torch.dtype
) -> None:
    """Numbers within their domain, and within what logits are computed in."""
    op = "linear_logps"
    given = {"scale": scale, "temperature": temperature}
    check_number(op, "scale", scale, "write scale=1.0 for none")
    check_number(op, "temperature", temperature, "write temperature=1.0 for none")
    if softcap is not None:
        check_number(op, "softcap", softcap, "write softcap=None for none")
        given["softcap"] = softcap
        if not 0 < softcap < math.inf:
            raise ValueError(f"linear_logps: softcap must be positive or None, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"linear_logps: temperature must be positive, got {temperature}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"linear_logps: scale must be finite, got {scale}")
    given["scale / temperature"] = quotient(scale, temperature)
    if softcap is not None:
        given["scale / softcap"] = quotient(scale, softcap)
        given["softcap / temperature"] = quotient(softcap, temperature)
    for name, value in given.items():
        check_range(op, name, value, torch.promote_types(dtype, torch.float32))


def _check_lora(lora: Lora, weight: Tensor) -> None:
    a, b, scaling = lora
    (r, a_d), (b_v, b_r), (v, d) = a.shape, b.shape, weight.shape
    if a_d != d or b_v != v or r != b_r or r == 0:
        raise ValueError(
            f"linear_logps: lora must be A [r, D={d}] and B [V={v}, r], got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    check_number("linear_logps", "lora's scaling", scaling, "write lora=(A, B, 1.0) for none")
    if not -math.inf < scaling < math.inf:
        raise ValueError(f"linear_logps: lora's scaling must be finite, got {scaling}")
    check_range(
        "linear_logps", "lora's scaling", scaling, torch.promote_types(a.dtype, torch.float32)
    )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "linear_logps: weight requires a gradient beneath a lora adapter; freeze it "
            "(requires_grad_(False)), or merge the adapter to train the whole head"
        )


FORWARD = (
    "linear_logps has no forward-mode derivative (torch.autograd.forward_ad): call backward(), "
    'or use impl="reference"'
)
BATCHED = (
    "linear_logps takes one gradient at a time, not a batch of them (vmap, is_grads_batched, "
    'jacobian(vectorize=True)): loop over them, or use impl="reference"'
)
TRANSFORMED = (
    "linear_logps does not work under torch.func transforms (vmap, grad, jvp): "
    "call it on the whole batch, its rows are independent"
)
