"""`linear_logps` in a graph of torch.compile: two opaque ops, and how autograd joins them.

A graph must know every shape beforehand, so exponentials are never kept for dW here. Arguments
arrive as the public op passes them on; values (targets) are checked when the graph runs.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .impls import in_forward_mode
from .late import raise_late
from .linear_logps_call import FORWARD, TRANSFORMED, Call
from .linear_logps_targets import check_targets

_NAMESPACE = (__package__ or "fastdpo_kernels").replace(".", "_")


def linear_logps_in_graph(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Log-probs [N] and the statistics that the call names."""
    outputs = cast(Any, _forward)(hidden, weight, targets, bias, adapter, *_flat(call))
    return outputs[0], [found.detach() for found in outputs[1 : 1 + len(call.stats)]]


def _flat(call: Call) -> tuple[Any, ...]:
    """The call as an op can take it: its fields in order, the names of statistics in one string."""
    return (
        call.impl, call.rounded, call.softcap, call.scale, call.temperature, call.ignore_index,
        ",".join(call.stats), call.workspace_bytes, call.need_hidden_grad, call.need_weight_grad,
        call.need_bias_grad,
    )  # fmt: skip


def _call(
    hidden: Tensor, weight: Tensor, flat: Sequence[Any], adapter: Tensor | None = None,
    *, tiny: bool = False,
) -> Call:  # fmt: skip
    """What the number of rows decides elsewhere must not divide graphs: tiny problems go their own
    way only when the graph runs, and only where that changes no shape, without a head to train."""
    fields = list(flat)
    fields[6] = tuple(name for name in fields[6].split(",") if name)
    call = Call(*fields)
    return call.chosen(hidden, weight, adapter, tiny=tiny and not call.need_head_grad)


@torch.library.custom_op(f"{_NAMESPACE}::linear_logps", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None,
    impl: str,
    rounded: torch.dtype,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    stats: str,
    workspace_bytes: int,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> list[Tensor]:
    """[log-probs, statistics ..., `hidden_grad` and `hidden_factor` (or empty), saved ...]."""
    flat = (impl, rounded, softcap, scale, temperature, ignore_index, stats, workspace_bytes,
            need_hidden_grad, need_weight_grad, need_bias_grad)  # fmt: skip
    call = _call(hidden, weight, flat, adapter, tiny=True)
    if in_forward_mode():
        raise RuntimeError(FORWARD)
    check_targets(targets, weight.shape[0], ignore_index)
    result = call.forward(hidden, weight, targets, bias, adapter, keep=False)
    grad, factor = result.hidden_grad, result.hidden_factor
    if grad is None:
        grad = hidden.new_empty(0, dtype=rounded)
    if factor is None:
        factor = hidden.new_empty(0, dtype=torch.float32)
    found = [getattr(result.stats, name) for name in call.stats]
    return [result.token_logps, *found, grad, factor, *result.saved]


@_forward.register_fake
def _(hidden, weight, targets, bias, adapter, *flat):
    call = _call(hidden, weight, flat)
    n = hidden.shape[0]
    wide = torch.promote_types(call.rounded, torch.float32)

    def rows(dtype: torch.dtype = wide) -> Tensor:
        return hidden.new_empty(n, dtype=dtype)

    found = [rows(torch.bool if name == "is_top1" else wide) for name in call.stats]
    grad = hidden.new_empty(hidden.shape if call.need_hidden_grad else (0,), dtype=call.rounded)
    factor = hidden.new_empty(n if call.need_hidden_factor else 0, dtype=torch.float32)
    saved = []
    if call.need_head_grad:
        saved = [rows() for _ in range(2 if call.impl == "triton" else 3)]
    return [rows(), *found, grad, factor, *saved]


@torch.library.custom_op(f"{_NAMESPACE}::linear_logps_weight_grad", mutates_args=())
def _weight_grad(
    grad_logps: Tensor,
    saved: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None,
    impl: str,
    rounded: torch.dtype,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    stats: str,
    workspace_bytes: int,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> list[Tensor]:
    """[dW [V, D] or the adapter's gradient [V, r], db [V]], of these what is due."""
    flat = (impl, rounded, softcap, scale, temperature, ignore_index, stats, workspace_bytes,
            need_hidden_grad, need_weight_grad, need_bias_grad)  # fmt: skip
    raise_late()
    grads = _call(hidden, weight, flat).weight_grad(
        hidden, weight, targets, bias, adapter, tuple(saved), grad_logps
    )
    return [grad for grad in grads if grad is not None]


@_weight_grad.register_fake
def _(grad_logps, saved, hidden, weight, targets, bias, adapter, *flat):
    *_, need_weight_grad, need_bias_grad = flat
    grads = []
    if need_weight_grad:
        trained = weight if adapter is None else adapter
        grads.append(torch.empty_like(trained, memory_format=torch.contiguous_format))
    if need_bias_grad:
        grads.append(torch.empty_like(bias))
    return grads


def _setup(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, adapter, *ctx.flat = inputs
    call = _call(hidden, weight, ctx.flat)
    ctx.set_materialize_grads(False)
    ctx.hidden_dtype, ctx.factored = hidden.dtype, call.need_hidden_factor
    grad, factor, *saved = output[1 + len(call.stats) :]
    head = [hidden, weight, targets, bias, adapter] if call.need_head_grad else [None] * 5
    ctx.save_for_backward(grad, factor, *head, *saved)


def _backward(ctx, grads):
    *_, need_hidden_grad, need_weight_grad, need_bias_grad = ctx.flat
    none = (None,) * len(ctx.flat)
    grad_logps = grads[0]
    if grad_logps is None:
        return (None,) * 5 + none
    unscaled, factor, hidden, weight, targets, bias, adapter, *saved = ctx.saved_tensors
    d_hidden = d_trained = d_bias = None
    if need_hidden_grad:
        scale = grad_logps * factor if ctx.factored else grad_logps
        d_hidden = (unscaled * scale[:, None]).to(ctx.hidden_dtype)
    if need_weight_grad or need_bias_grad:
        head_grads = cast(Any, _weight_grad)(
            grad_logps, saved, hidden, weight, targets, bias, adapter, *ctx.flat
        )
        d_trained = head_grads[0] if need_weight_grad else None
        d_bias = head_grads[-1] if need_bias_grad else None
    d_weight, d_adapter = (d_trained, None) if adapter is None else (None, d_trained)
    return d_hidden, d_weight, None, d_bias, d_adapter, *none


_forward.register_autograd(_backward, setup_context=_setup)


def _no_second(ctx, grads):
    raise RuntimeError(
        "linear_logps has no second derivative: its gradient was finished in the forward pass; "
        'use impl="reference" to differentiate twice'
    )


_weight_grad.register_autograd(_no_second)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError(TRANSFORMED)


_forward.register_vmap(_no_vmap)
_weight_grad.register_vmap(_no_vmap)
