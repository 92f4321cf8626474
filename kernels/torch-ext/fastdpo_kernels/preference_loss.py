"""`preference_loss`: token log-probs of a pack -> loss, rewards and log-probs of its pairs.

The public op: it checks its arguments once, chooses the implementation, and joins it to autograd.
An implementation finishes the losses and their two derivatives per pair in the forward pass;
backward, here, is a sum over the pairs that share a response, a gather to its tokens and a scale.
Losses of other kinds are functions of `logps`, not ops.
"""

import importlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .impls import PreferenceForward, choose_impl, has_tangent, in_forward_mode, is_transformed
from .late import raise_late
from .preference_loss_check import TRANSFORMED, check, check_options, check_values
from .reference import preference_loss_reference


@dataclass(frozen=True)
class PreferenceOutput:
    """`loss` [] (the mean) and `losses` [P] carry gradients; rewards [P] and `logps` [R] do not.

    Log-probs are in nat, summed over a response's tokens; rewards are beta * (logps - ref_logps).
    All fp32 (fp64 for fp64 token log-probs).
    """

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    logps: Tensor


def preference_loss(
    token_logps: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    impl: str = "auto",
) -> PreferenceOutput:
    """Returns the preference losses of `pairs` of responses.

    With d = logps - ref_logps of a response, m = beta * (d_chosen - d_rejected), smoothing e:

        sigmoid: -(1 - e) log sigmoid(m) - e log sigmoid(-m)
            DPO (arXiv 2305.18290, eq. 7); with e > 0, conservative DPO.
        hinge: max(0, 1 - m)
            SLiC's loss (2305.10425) on DPO's margin.
        ipo: (d_chosen / len_chosen - d_rejected / len_rejected - 1 / (2 beta))^2
            IPO (2310.12036, eq. 17); log-ratios averaged over their response's tokens, as in TRL.

    Args:
        token_logps: [N], the tokens of all responses, one response after the other.
        cu_responses: [R + 1] int32, from 0 to N: where each response begins and the last one
            ends. A response may be empty: its logps are 0 and its length counts as 1.
        pairs: [P, 2] int64, the chosen and the rejected response of each pair. A response may be
            in several pairs or in none. With P = 0 the loss is 0.
        ref_token_logps: [N], the reference's token log-probs, or else ref_logps: [R], summed over
            each response.
        beta: positive; the strength of the pull towards the reference.
        loss_type, label_smoothing: as above; label smoothing, in [0, 0.5), is for sigmoid alone.
        impl: "auto" chooses by device and logs it once; "torch" and "triton" run that or raise;
            "reference" is eager.

    Sums over tokens are fp64 and in a fixed order: results are bitwise repeatable. Only
    `token_logps` gets a gradient, once: double backward raises. torch.compile takes it into its
    graph as one op (all but `impl="reference"`).

    Raises:
        TypeError, ValueError: arguments that do not fit each other or lie outside their domain,
            naming both sides. What is wrong with the values of `cu_responses` or `pairs` is named
            at once on a CPU; on a GPU, which is not waited for, such a response or pair gives NaN
            and a later call raises, or `raise_pending`.
        RuntimeError: `impl="triton"` where Triton cannot run.
    """
    check(token_logps, cu_responses, pairs, ref_token_logps, ref_logps)
    check_options(beta, loss_type, label_smoothing)
    inputs = (token_logps, cu_responses, pairs, ref_token_logps, ref_logps)
    options = {
        "beta": float(beta),
        "loss_type": loss_type,
        "label_smoothing": float(label_smoothing),
    }
    if torch.compiler.is_compiling() and impl != "reference":
        losses, *rest = cast(Any, _in_graph)(*inputs, *options.values(), impl)
        chosen_rewards, rejected_rewards, logps, *_ = (each.detach() for each in rest)
        return PreferenceOutput(_mean(losses), losses, chosen_rewards, rejected_rewards, logps)
    check_values(cu_responses, pairs, len(token_logps))
    if impl == "reference":
        result = preference_loss_reference(*inputs, **options)
        loss, losses = _mean(result.losses), result.losses
    else:
        if any(map(has_tangent, (token_logps, ref_token_logps, ref_logps))):
            raise RuntimeError(FORWARD)
        result = _forward(*inputs, **options, impl=impl)
        loss, losses = _PreferenceLoss.apply(token_logps, cu_responses, pairs, result)
    return PreferenceOutput(
        loss, losses, result.chosen_rewards, result.rejected_rewards, result.logps
    )


def _forward(
    token_logps: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    impl: str,
    **options: Any,
) -> PreferenceForward:
    chosen = choose_impl("preference_loss", impl, token_logps.device, token_logps.dtype)
    module = importlib.import_module(f".preference_loss_{chosen}", __package__)
    with torch.no_grad(), torch.autocast(token_logps.device.type, enabled=False):
        return module.forward(
            token_logps, cu_responses, pairs, ref_token_logps, ref_logps, **options
        )


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps, cu_responses, pairs, result: PreferenceForward):
        ctx.save_for_backward(
            token_logps, cu_responses, pairs, result.chosen_slope, result.rejected_slope
        )
        ctx.set_materialize_grads(False)
        return _mean(result.losses), result.losses.clone()

    @staticmethod
    def backward(ctx, *grads):
        raise_late()
        grad_loss, grad_losses = grads
        if any(grad is not None and is_transformed(grad) for grad in grads):
            raise RuntimeError(BATCHED)
        token_logps, cu_responses, pairs, chosen_slope, rejected_slope = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(token_logps.device.type, enabled=False):
            g = torch.zeros_like(chosen_slope)  # [P]
            if grad_loss is not None:
                g += grad_loss / max(len(g), 1)
            if grad_losses is not None:
                g += grad_losses
            slopes = (chosen_slope, rejected_slope)
            grad = _token_grad(g, cu_responses, pairs, *slopes, len(token_logps), token_logps.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            grad = _Once.apply(token_logps, grad_loss, grad_losses, grad)
        return grad, None, None, None


def _token_grad(
    g: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    chosen_slope: Tensor,
    rejected_slope: Tensor,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient [N] of sum_p g_p loss_p: a response's is that of each of its tokens."""
    sides = torch.cat([g * chosen_slope, g * rejected_slope])  # [2P]
    responses = torch.cat([pairs[:, 0], pairs[:, 1]])
    per_response = _sum_by(responses, sides, len(cu_responses) - 1).to(dtype)  # [R]
    if g.device.type == "cpu":
        return per_response.repeat_interleave(cu_responses.diff(), output_size=n)
    return _spread(per_response, cu_responses, n)


def _spread(values: Tensor, bounds: Tensor, n: int) -> Tensor:
    """[R] -> [N], each token that of its response; inside its memory whatever `bounds` [R + 1] are,
    for nobody has looked at them."""
    if len(values) == 0:
        return values.new_zeros(n)
    tokens = torch.arange(n, dtype=bounds.dtype, device=bounds.device)
    response = torch.searchsorted(bounds.contiguous(), tokens, right=True) - 1
    return values[response.clamp_(0, len(values) - 1)]


# ---- in a graph of torch.compile: opaque ops, values checked when it runs

_NAMESPACE = (__package__ or "fastdpo_kernels").replace(".", "_")


@torch.library.custom_op(f"{_NAMESPACE}::preference_loss", mutates_args=())
def _in_graph(
    token_logps: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    impl: str,
) -> list[Tensor]:
    """The fields of a `PreferenceForward`, in order; gradients go through the losses alone."""
    if in_forward_mode():
        raise RuntimeError(FORWARD)
    check_values(cu_responses, pairs, len(token_logps))
    result = _forward(
        token_logps, cu_responses, pairs, ref_token_logps, ref_logps,
        beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, impl=impl,
    )  # fmt: skip
    return list(vars(result).values())


@_in_graph.register_fake
def _(token_logps, cu_responses, pairs, ref_token_logps, ref_logps, *options):
    dtype = torch.promote_types(token_logps.dtype, torch.float32)
    p, r = pairs.shape[0], cu_responses.shape[0] - 1
    return [token_logps.new_empty(size, dtype=dtype) for size in (p, p, p, r, p, p)]


@torch.library.custom_op(f"{_NAMESPACE}::preference_loss_grad", mutates_args=())
def _grad_in_graph(
    g: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    chosen_slope: Tensor,
    rejected_slope: Tensor,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    return _token_grad(g, cu_responses, pairs, chosen_slope, rejected_slope, n, dtype)


@_grad_in_graph.register_fake
def _(g, cu_responses, pairs, chosen_slope, rejected_slope, n, dtype):
    return g.new_empty(n, dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    token_logps, cu_responses, pairs, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.n, ctx.dtype = token_logps.shape[0], token_logps.dtype
    ctx.save_for_backward(cu_responses, pairs, *output[4:])


def _backward(ctx, grads):
    grad = None
    if grads[0] is not None:
        grad = cast(Any, _grad_in_graph)(grads[0], *ctx.saved_tensors, ctx.n, ctx.dtype)
    return (grad,) + (None,) * 8


def _no_second(ctx, grad):
    raise RuntimeError(SECOND)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError(TRANSFORMED)


_in_graph.register_autograd(_backward, setup_context=_setup)
_grad_in_graph.register_autograd(_no_second)
_in_graph.register_vmap(_no_vmap)
_grad_in_graph.register_vmap(_no_vmap)


SECOND = (
    "preference_loss has no second derivative: its gradient was finished in the forward "
    'pass; use impl="reference" to differentiate twice'
)
BATCHED = (
    "preference_loss takes one gradient at a time, not a batch of them (vmap, is_grads_batched, "
    'jacobian(vectorize=True)): loop over them, or use impl="reference"'
)
FORWARD = (
    "preference_loss has no forward-mode derivative (torch.autograd.forward_ad): call backward(), "
    'or use impl="reference"'
)


class _Once(torch.autograd.Function):
    """Passes a gradient on; its own backward raises."""

    @staticmethod
    def forward(ctx, token_logps, grad_loss, grad_losses, grad):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(SECOND)


def _mean(losses: Tensor) -> Tensor:
    """0 without pairs: a pack that holds none must not turn the step's loss into 0 / 0."""
    return (losses.sum(dtype=torch.float64) / max(len(losses), 1)).to(losses.dtype)


def _sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums `values` that share an index in [0, size), in the order they stand in: no atomics."""
    if values.device.type == "cpu":  # one thread, front to back
        return values.new_zeros(size).index_add_(0, index, values)
    index, order = torch.sort(index, stable=True)
    bounds = torch.searchsorted(index, torch.arange(size + 1, device=index.device))
    return torch.segment_reduce(values[order], "sum", offsets=bounds, initial=0)
