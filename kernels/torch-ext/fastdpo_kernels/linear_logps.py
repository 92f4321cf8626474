"""`linear_logps`: the log-prob of each target under a linear head, without the [N, V] logits.

The public op: it checks its arguments once, chooses the implementation, and joins it to autograd.
The mathematics is in `reference.py`; how it is done without logits, in `linear_logps_torch.py` and
`linear_logps_triton.py`; how a compiled graph calls it, in `linear_logps_graph.py`.
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .impls import TokenStats, has_tangent, is_transformed
from .late import raise_late
from .linear_logps_call import BATCHED, FORWARD, Call, Lora, check, scale_rows
from .linear_logps_graph import linear_logps_in_graph
from .linear_logps_lora import beside_adapter
from .linear_logps_targets import check_targets, outside
from .reference import linear_logps_reference


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
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
    lora: Lora | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str],
    impl: str = "auto",
    workspace_bytes: int = 256 * 2**20,
) -> tuple[Tensor, TokenStats]: ...


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
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
    softcap * tanh(a / softcap) / temperature. Extra memory is `workspace_bytes` at any N, the
    result, and the gradients that are asked for: of `hidden` twice, for it is finished during the
    forward pass up to a factor per row (a number that fp16 keeps beside it: what a loss scale is to
    save would underflow before); of `bias` as sums [V] in fp32. Where `weight`, `bias` or B is
    trained, two or three numbers of each row stay for the backward pass, and all exponentials
    [N, V] if the workspace has room for them beside its tiles: that part of it is then held until
    the backward pass, which need not compute them again. Otherwise nothing of size [N, V] exists,
    but for tiny problems (see `impl`), within the workspace.
    GEMMs over N x D x V: 1 for the log-probs (2 by impl="torch" on a GPU), 1 for `hidden` and A,
    1 for `weight` (for B one of r columns), none for `bias`; for any of the last three 1 more where
    no exponentials were kept.

    Args:
        hidden: [N, D], fp64, fp32, fp16 or bf16, any strides; N may be 0.
        weight: [V, D], a float dtype of its own; it is rounded to that of `hidden` part by part,
            never as a whole.
        targets: [N] int64 in [0, V), or `ignore_index`: such a row gives 0 and no gradient,
            whatever it holds.
        bias: [V].
        lora: (A [r, D], B [V, r], scaling), an adapter on the head: hidden @ weight.T becomes
            hidden @ weight.T + scaling * (hidden @ A.T) @ B.T. `weight` is frozen then. The inner
            product [N, r] is summed in fp32 and, in 16 bits, held in two numbers; one copy of
            `hidden` beside it is alive between forward and backward.
        softcap, scale, temperature: the transform above; `softcap` and `temperature` are positive.
        stats: any of "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"; then a `TokenStats`
            comes back too.
        impl: "auto" chooses by device and logs it once (what is tiny, on a CPU vocabularies up to
            4096, is not divided); "torch" and "triton" run that or raise; "reference" is eager.
        workspace_bytes: the bound on temporary memory; less makes smaller tiles, not another
            result in kind. Rows are taken in blocks: what it must hold depends on D and V alone.

    Products are summed in fp32 (fp64 for fp64). Under autocast, `hidden` is rounded to the
    autocast dtype, as `linear` would do, but part by part. Gradients flow to those of `hidden`,
    `weight`, `bias`, A and B that require them, once and one at a time: double backward, forward
    mode, torch.func transforms and batches of gradients raise. torch.compile takes it into its
    graph as one op (all but `impl="reference"`), where exponentials are never kept: a trained head
    takes four GEMMs then.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, naming both sides. A target
            outside [0, V) is named at once on a CPU; on a GPU, which is not waited for, its row
            gives NaN (`is_top1`: False) and a later call raises, or `raise_pending`.
        RuntimeError: `impl="triton"` where Triton cannot run.
    """
    if isinstance(stats, str):
        raise TypeError(f"linear_logps: stats is a sequence of names; write stats=({stats!r},)")
    stats = tuple(stats)
    check(
        hidden, weight, targets, bias, lora, softcap, scale, temperature, ignore_index, stats,
        workspace_bytes,
    )  # fmt: skip
    device, rounded = hidden.device, hidden.dtype
    if torch.is_autocast_enabled(device.type) and rounded != torch.float64:
        rounded = torch.get_autocast_dtype(device.type)
    transform: dict[str, Any] = {
        "softcap": None if softcap is None else float(softcap),
        "scale": float(scale),
        "temperature": float(temperature),
        "ignore_index": int(ignore_index),
    }
    if impl == "reference":
        return _reference(hidden.to(rounded), weight, targets, bias, lora, stats, transform)
    adapter = None
    if lora is not None:
        a, adapter, scaling = lora
        if not torch.compiler.is_compiling() and any(map(has_tangent, (hidden, a))):
            raise RuntimeError(FORWARD)  # what joins them would drop it
        hidden = beside_adapter(hidden, a, targets, rounded, float(scaling), ignore_index)
    trained = weight if adapter is None else adapter
    grad_on = torch.is_grad_enabled()
    call = Call(
        impl=impl,
        rounded=rounded,
        **transform,
        stats=stats,
        workspace_bytes=int(workspace_bytes),
        need_hidden_grad=grad_on and hidden.requires_grad,
        need_weight_grad=grad_on and trained.requires_grad,
        need_bias_grad=grad_on and bias is not None and bias.requires_grad,
    )
    if torch.compiler.is_compiling():
        logps, found = linear_logps_in_graph(call, hidden, weight, targets, bias, adapter)
    else:
        logps, found = _eager(call, hidden, weight, targets, bias, adapter)
    return (logps, TokenStats(**dict(zip(stats, found, strict=True)))) if stats else logps


def _eager(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    if any(map(has_tangent, (hidden, weight, bias, adapter))):
        raise RuntimeError(FORWARD)
    call = call.chosen(hidden, weight, adapter, tiny=True)
    check_targets(targets, weight.shape[0], call.ignore_index)
    anchor = hidden[:0].clone() if call.need_hidden_grad else None
    logps, *found = _LinearLogps.apply(hidden, weight, bias, adapter, targets, anchor, call)
    return logps, found


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    stats: tuple[str, ...],
    transform: dict[str, Any],
) -> Tensor | tuple[Tensor, TokenStats]:
    v, ignore_index = weight.shape[0], transform["ignore_index"]
    check_targets(targets, v, ignore_index)
    bad = None if targets.device.type == "cpu" else outside(targets, v, ignore_index)
    if bad is not None:
        targets = targets.masked_fill(bad, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        logps, every = linear_logps_reference(
            hidden, weight, targets, bias=bias, lora=lora, **transform
        )
    found = {name: getattr(every, name) for name in stats}
    if bad is not None:
        logps = logps.masked_fill(bad, math.nan)
        found = {
            name: value.masked_fill(bad, math.nan) if value.is_floating_point() else value
            for name, value in found.items()
        }
    return (logps, TokenStats(**found)) if stats else logps


class _LinearLogps(torch.autograd.Function):
    """`anchor` [0, D] hangs on `hidden`, so that `_Once` can refuse a second derivative even
    where `hidden` is not kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, adapter, targets, anchor, call: Call):
        result = call.forward(hidden, weight, targets, bias, adapter, keep=True)
        found = tuple(getattr(result.stats, name) for name in call.stats)
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.hidden_dtype = hidden.dtype
        inputs = (hidden, weight, bias, adapter, targets) if call.need_head_grad else (None,) * 5
        ctx.save_for_backward(
            result.hidden_grad, result.hidden_factor, anchor, *inputs, *result.saved
        )
        return (result.token_logps, *found)

    @staticmethod
    def backward(ctx, *grads):
        grad_logps = grads[0]
        if grad_logps is None:
            return (None,) * 7
        if is_transformed(grad_logps):
            raise RuntimeError(BATCHED)
        raise_late()
        call: Call = ctx.call
        unscaled, factor, anchor, hidden, weight, bias, adapter, targets, *saved = ctx.saved_tensors
        d_hidden = d_trained = d_bias = None
        if unscaled is not None:
            with torch.no_grad(), torch.autocast(grad_logps.device.type, enabled=False):
                scale = grad_logps.detach() if factor is None else grad_logps.detach() * factor
                d_hidden = scale_rows(unscaled, scale, ctx.hidden_dtype)
        if call.need_head_grad:
            d_trained, d_bias = call.weight_grad(
                hidden, weight, targets, bias, adapter, tuple(saved), grad_logps
            )
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (grad_logps, anchor, weight, bias, adapter)
            d_hidden, d_trained, d_bias = _Once.apply(*inputs, d_hidden, d_trained, d_bias)
        of_head = (d_trained, d_bias, None) if adapter is None else (None, d_bias, d_trained)
        return d_hidden, *of_head, None, None, None


class _Once(torch.autograd.Function):
    """Passes gradients on; its own backward raises."""

    @staticmethod
    def forward(ctx, grad_logps, anchor, weight, bias, adapter, *grads):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "linear_logps has no second derivative: its gradient was finished in the forward pass; "
            'use impl="reference" to differentiate twice'
        )
