"""`linear_logps`: the log-prob of each target under a linear head, without the [N, V] logits.

The public op: it checks its arguments once, chooses the implementation, and joins it to autograd.
The mathematics is in `reference.py`; how it is done without logits, in `linear_logps_torch.py` and
`linear_logps_triton.py`.
"""

import importlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from .impls import STATS, TokenStats, choose_impl, is_transformed, outside_graph
from .reference import linear_logps_reference

NO_TARGET = torch.iinfo(torch.int64).min  # an ignore_index that ignores nothing
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: tuple[()] = (),
    impl: str = "auto",
    workspace_bytes: int = 256 * 2**20,
) -> Tensor: ...


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str],
    impl: str = "auto",
    workspace_bytes: int = 256 * 2**20,
) -> tuple[Tensor, TokenStats]: ...


@outside_graph
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
    impl: str = "auto",
    workspace_bytes: int = 256 * 2**20,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Returns log softmax(z)[n, targets[n]] of every row n: [N], in nat, fp32 (fp64 for fp64).

    With a = scale * (hidden @ weight.T + bias), the logits are z = a / temperature, or
    softcap * tanh(a / softcap) / temperature. Nothing of size [N, V] is kept: extra memory is
    `workspace_bytes`, the result, and the gradient of `hidden`, which is finished during the
    forward pass up to a factor per row.

    Args:
        hidden: [N, D], fp64, fp32, fp16 or bf16, any strides; N may be 0.
        weight: [V, D], a float dtype of its own; it is rounded to that of `hidden` part by part,
            never as a whole.
        targets: [N] int64 in [0, V), or `ignore_index`: such a row gives 0 and no gradient,
            whatever it holds.
        bias: [V].
        softcap, scale, temperature: the transform above; `softcap` and `temperature` are positive.
        stats: any of "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"; then a `TokenStats`
            comes back too.
        impl: "auto" chooses by device and logs it once; "torch" and "triton" run that or raise;
            "reference" is eager.
        workspace_bytes: the bound on temporary memory; less makes smaller tiles, not another
            result in kind.

    Products are summed in fp32 (fp64 for fp64). Under autocast, `hidden` is rounded to the
    autocast dtype, as `linear` would do. Gradients flow to those of `hidden`, `weight` and `bias`
    that require them, once: double backward and torch.func transforms raise.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, naming both sides. A target
            outside [0, V) is named at once on a CPU; on a GPU, which is not waited for, its row
            gives NaN and a later call raises.
        RuntimeError: `impl="triton"` where Triton cannot run.
    """
    stats = tuple(stats)
    _check(hidden, weight, targets, bias, softcap, scale, temperature, stats, workspace_bytes)
    device = hidden.device
    rounded = hidden.dtype
    if torch.is_autocast_enabled(device.type) and rounded != torch.float64:
        rounded = torch.get_autocast_dtype(device.type)
    chosen = choose_impl("linear_logps", impl, device, rounded, weight.dtype)
    targets, bad = _check_targets(targets, weight.shape[0], ignore_index)
    transform: dict[str, Any] = {
        "softcap": None if softcap is None else float(softcap),
        "scale": float(scale),
        "temperature": float(temperature),
        "ignore_index": int(ignore_index),
    }
    if chosen == "reference":
        with torch.autocast(device.type, enabled=False):
            logps, every = linear_logps_reference(
                hidden.to(rounded), weight, targets, bias=bias, **transform
            )
        token_stats = TokenStats(**{name: getattr(every, name) for name in stats})
    else:
        grad_on = torch.is_grad_enabled()
        plan = _Plan(
            impl=importlib.import_module(f".linear_logps_{chosen}", __package__),
            rounded=rounded,
            transform=transform,
            stats=stats,
            workspace_bytes=workspace_bytes,
            need_hidden_grad=grad_on and hidden.requires_grad,
            need_weight_grad=grad_on and weight.requires_grad,
            need_bias_grad=grad_on and bias is not None and bias.requires_grad,
        )
        anchor = hidden[:0].clone() if plan.need_hidden_grad else None
        logps, *found = _LinearLogps.apply(hidden, weight, bias, targets, anchor, plan)
        token_stats = TokenStats(**dict(zip(stats, found, strict=True)))
    if bad is not None:
        logps = logps.masked_fill(bad, math.nan)
    return (logps, token_stats) if stats else logps


@dataclass(frozen=True)
class _Plan:
    impl: ModuleType
    rounded: torch.dtype
    transform: dict[str, Any]
    stats: tuple[str, ...]
    workspace_bytes: int
    need_hidden_grad: bool
    need_weight_grad: bool
    need_bias_grad: bool


class _LinearLogps(torch.autograd.Function):
    """`anchor` [0, D] hangs on `hidden`, so that `_Once` can refuse a second derivative even
    where `hidden` is not kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, anchor, plan: _Plan):
        head_grad = plan.need_weight_grad or plan.need_bias_grad
        with torch.autocast(hidden.device.type, enabled=False):
            result = plan.impl.forward(
                hidden.detach().to(plan.rounded),
                weight.detach(),
                targets,
                bias=None if bias is None else bias.detach(),
                **plan.transform,
                stats=plan.stats,
                need_hidden_grad=plan.need_hidden_grad,
                need_weight_grad=head_grad,
                workspace_bytes=plan.workspace_bytes,
            )
        found = tuple(getattr(result.stats, name) for name in plan.stats)
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.hidden_dtype = hidden.dtype
        inputs = (hidden, weight, bias, targets) if head_grad else (None,) * 4
        ctx.save_for_backward(result.hidden_grad, anchor, *inputs, *result.saved)
        return (result.token_logps, *found)

    @staticmethod
    def backward(ctx, *grads):
        grad_logps = grads[0]
        if grad_logps is None:
            return (None,) * 6
        _raise_bad_targets()
        plan: _Plan = ctx.plan
        unscaled, anchor, hidden, weight, bias, targets, *saved = ctx.saved_tensors
        d_hidden = d_weight = d_bias = None
        with torch.no_grad(), torch.autocast(grad_logps.device.type, enabled=False):
            g = grad_logps.detach()
            if unscaled is not None:
                d_hidden = (unscaled * g[:, None]).to(ctx.hidden_dtype)
            if plan.need_weight_grad or plan.need_bias_grad:
                d_weight, d_bias = plan.impl.weight_grad(
                    hidden.detach().to(plan.rounded),
                    weight.detach(),
                    targets,
                    tuple(saved),
                    g,
                    bias=None if bias is None else bias.detach(),
                    **plan.transform,
                    workspace_bytes=plan.workspace_bytes,
                    need_bias_grad=plan.need_bias_grad,
                )
                if not plan.need_weight_grad:
                    d_weight = None
        if torch.is_grad_enabled():  # create_graph=True
            out = _Once.apply(grad_logps, anchor, weight, bias, d_hidden, d_weight, d_bias)
            d_hidden, d_weight, d_bias = out
        return d_hidden, d_weight, d_bias, None, None, None


class _Once(torch.autograd.Function):
    """Passes gradients on; its own backward raises."""

    @staticmethod
    def forward(ctx, grad_logps, anchor, weight, bias, *grads):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "linear_logps has no second derivative: its gradient was finished in the forward pass; "
            'use impl="reference" to differentiate twice'
        )


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    stats: tuple[str, ...],
    workspace_bytes: int,
) -> None:
    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        _check_kind(name, tensor)
    for name, dims in (("hidden", 2), ("weight", 2), ("targets", 1), ("bias", 1)):
        if name in tensors and tensors[name].ndim != dims:
            shape = tuple(tensors[name].shape)
            raise ValueError(f"linear_logps: {name} must have {dims} dimension(s), got {shape}")
    (n, d), (v, weight_d) = hidden.shape, weight.shape
    if d != weight_d:
        raise ValueError(f"linear_logps: expected D={weight_d} (weight), got {d} (hidden)")
    if v == 0 or d == 0:
        raise ValueError(f"linear_logps: weight is empty: {tuple(weight.shape)}")
    if len(targets) != n:
        raise ValueError(f"linear_logps: expected {n} targets (rows of hidden), got {len(targets)}")
    if bias is not None and len(bias) != v:
        raise ValueError(f"linear_logps: expected {v} biases (rows of weight), got {len(bias)}")
    for name, tensor in tensors.items():
        if name == "targets":
            if tensor.dtype != torch.int64:
                raise TypeError(f"linear_logps: targets must be int64, got {tensor.dtype}")
        elif tensor.dtype not in _FLOATS:
            raise TypeError(
                f"linear_logps: {name} is {tensor.dtype}; expected float64, float32, float16 or "
                "bfloat16 (dequantize a quantized head first)"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"linear_logps: {name} is on {tensor.device}, hidden on {hidden.device}"
            )
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"linear_logps: float64 mixes with nothing else: hidden is {hidden.dtype}, "
            f"weight {weight.dtype}"
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"linear_logps: softcap must be positive or None, got {softcap}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"linear_logps: temperature must be positive, got {temperature}")
    if not math.isfinite(scale):
        raise ValueError(f"linear_logps: scale must be finite, got {scale}")
    for name in stats:
        if name not in STATS:
            raise ValueError(
                f"linear_logps: no statistic is called {name!r}; expected {', '.join(STATS)}"
            )
    if len(set(stats)) != len(stats):
        raise ValueError(f"linear_logps: stats names one twice: {', '.join(stats)}")
    if workspace_bytes <= 0:
        raise ValueError(f"linear_logps: workspace_bytes must be positive, got {workspace_bytes}")


def _check_kind(name: str, tensor: Tensor) -> None:
    """Refuses what only looks like a plain tensor, by name."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"linear_logps: {name} must be a tensor, got {type(tensor).__name__}")
    kind = type(tensor).__name__
    if kind in ("Params4bit", "Int8Params"):
        raise TypeError(
            f"linear_logps: {name} is a bitsandbytes {kind}; dequantize it, or keep the head "
            "unquantized (transformers does by default)"
        )
    if kind == "DTensor":
        raise TypeError(f"linear_logps: {name} is a DTensor; pass its full_tensor()")
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise TypeError(f"linear_logps: {name} is a ZeRO-3 shard; gather it around the call")
    if is_transformed(tensor):
        raise RuntimeError(
            "linear_logps does not work under torch.func transforms (vmap, grad, jvp): "
            "call it on the whole batch, its rows are independent"
        )


def _check_targets(targets: Tensor, v: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Returns targets safe to index with, and which were not (None on a CPU: it raises)."""
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= v))
    if targets.device.type == "cpu":
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(_bad_target(row, int(targets[row]), v, ignore_index))
        return targets, None
    _raise_bad_targets()
    if len(targets) == 0:
        return targets, None
    if targets.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        row = bad.int().argmax()
        report = torch.stack([bad[row].long(), row, targets[row]])
        host = torch.empty(3, dtype=torch.int64, pin_memory=True)
        host.copy_(report, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(targets.device))
        _pending.append((done, host, v, ignore_index))
    return targets.masked_fill(bad, ignore_index), bad


# Reports on their way from a GPU, oldest first.
_pending: deque[tuple[Any, Tensor, int, int]] = deque()


def _raise_bad_targets() -> None:
    """Raises for a bad target of an earlier call whose report has arrived; waits for none."""
    while _pending and _pending[0][0].query():
        _, host, v, ignore_index = _pending.popleft()
        found, row, target = host.tolist()
        if found:
            raise ValueError("in an earlier call, " + _bad_target(row, target, v, ignore_index))


def _bad_target(row: int, target: int, v: int, ignore_index: int) -> str:
    way_out = f"mark rows to leave out with ignore_index={ignore_index}"
    if ignore_index == NO_TARGET:
        way_out = "pass only the rows to be scored"
    return f"linear_logps: targets[{row}] = {target} is outside [0, V={v}); {way_out}"
