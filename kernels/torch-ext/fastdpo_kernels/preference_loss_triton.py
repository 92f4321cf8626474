"""`preference_loss` in one Triton launch: segment sums, losses, rewards and slopes.

The first R programs sum one response each; the next P do one pair each, and sum its two responses
again, in the same order: no program waits for another, no atomics, bitwise repeatable. Sums are
fp64: they are short, and a log-ratio is a small difference of large sums.
Callers have checked the arguments.
"""

# Triton's language is Python in syntax alone: checkers know neither its arguments nor its tensors.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .impls import PreferenceForward

LOSSES = {"sigmoid": 0, "hinge": 1, "ipo": 2}
BLOCK = 512  # tokens at a time

_SIGMOID: tl.constexpr = tl.constexpr(LOSSES["sigmoid"])
_HINGE: tl.constexpr = tl.constexpr(LOSSES["hinge"])


@triton.jit
def _response(
    response, n_responses, n_tokens, token_ptr, ref_token_ptr, ref_logps_ptr, cu_ptr,
    stride_token, stride_ref_token, stride_ref, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob, log-ratio and length of one response, fp64; NaN for one that does not exist, or
    whose tokens do not."""
    ok = (response >= 0) & (response < n_responses)
    start = tl.load(cu_ptr + response, mask=ok, other=0)
    end = tl.load(cu_ptr + response + 1, mask=ok, other=0)
    ok = ok & (start >= 0) & (start <= end) & (end <= n_tokens)
    end = tl.where(ok, end, start)
    logps = tl.zeros((BLOCK,), tl.float64)
    ratio = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        at64 = at.to(tl.int64)
        token = tl.load(token_ptr + at64 * stride_token, mask=at < end, other=0.0).to(tl.float64)
        logps += token
        if ref_token_ptr is not None:
            ref = tl.load(ref_token_ptr + at64 * stride_ref_token, mask=at < end, other=0.0)
            ratio += token - ref.to(tl.float64)
    total = tl.where(ok, tl.sum(logps, 0), float("nan"))
    if ref_token_ptr is not None:
        difference = tl.sum(ratio, 0)
    else:
        ref = tl.load(ref_logps_ptr + response * stride_ref, mask=ok, other=0.0)
        difference = total - ref.to(tl.float64)
    return total, tl.where(ok, difference, float("nan")), tl.maximum(end - start, 1).to(tl.float64)


@triton.jit
def _softplus(x):
    # log(1 + e^x) in fp64: log(w) e / (w - 1) with w = 1 + e rounded loses nothing for small e.
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    tiny = w == 1.0
    log1p = tl.where(tiny, e, tl.log(w) * (e / tl.where(tiny, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit(do_not_specialize=["n_responses", "n_tokens"])
def _preference_loss_kernel(
    token_ptr,  # [N]
    ref_token_ptr,  # [N] or None
    ref_logps_ptr,  # [R], if there is no ref_token
    cu_ptr,  # [R + 1] int32
    pairs_ptr,  # [P, 2] int64
    logps_ptr,  # out: [R] fp32
    losses_ptr,  # out, like those below: [P] fp32
    chosen_reward_ptr,
    rejected_reward_ptr,
    chosen_slope_ptr,
    rejected_slope_ptr,
    n_responses,
    n_tokens,
    stride_token,
    stride_ref_token,
    stride_ref,
    stride_pair,
    stride_side,
    beta,
    label_smoothing,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program < n_responses:
        logps, _, _ = _response(  # pyright: ignore[reportGeneralTypeIssues]
            program, n_responses, n_tokens, token_ptr, ref_token_ptr, ref_logps_ptr, cu_ptr,
            stride_token, stride_ref_token, stride_ref, BLOCK,
        )  # fmt: skip
        tl.store(logps_ptr + program, logps.to(tl.float32))
    else:
        pair = program - n_responses
        chosen = tl.load(pairs_ptr + pair * stride_pair)
        rejected = tl.load(pairs_ptr + pair * stride_pair + stride_side)
        _, up, up_length = _response(  # pyright: ignore[reportGeneralTypeIssues]
            chosen, n_responses, n_tokens, token_ptr, ref_token_ptr, ref_logps_ptr, cu_ptr,
            stride_token, stride_ref_token, stride_ref, BLOCK,
        )  # fmt: skip
        _, down, down_length = _response(
            rejected, n_responses, n_tokens, token_ptr, ref_token_ptr, ref_logps_ptr, cu_ptr,
            stride_token, stride_ref_token, stride_ref, BLOCK,
        )  # fmt: skip
        strength = tl.full((), beta, tl.float64)
        margin = strength * (up - down)
        if LOSS == _SIGMOID:
            smooth = tl.full((), label_smoothing, tl.float64)
            loss = (1.0 - smooth) * _softplus(-margin) + smooth * _softplus(margin)
            slope_up = strength * (smooth - _sigmoid(-margin))
            slope_down = -slope_up
        elif LOSS == _HINGE:
            loss = tl.where(margin >= 1.0, 0.0, 1.0 - margin)  # a NaN stays
            slope_up = tl.where(margin >= 1.0, 0.0, -strength)
            slope_down = -slope_up
        else:
            off = up / up_length - down / down_length - 0.5 / strength
            loss = off * off
            slope_up = 2.0 * off / up_length
            slope_down = -2.0 * off / down_length
        tl.store(losses_ptr + pair, loss.to(tl.float32))
        tl.store(chosen_reward_ptr + pair, (strength * up).to(tl.float32))
        tl.store(rejected_reward_ptr + pair, (strength * down).to(tl.float32))
        tl.store(chosen_slope_ptr + pair, slope_up.to(tl.float32))
        tl.store(rejected_slope_ptr + pair, slope_down.to(tl.float32))


def forward(
    token_logps: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> PreferenceForward:
    """See `impls.PreferenceForward`; everything returned is fp32."""
    r, p = len(cu_responses) - 1, len(pairs)
    logps = torch.empty(r, device=token_logps.device)
    losses, *rest = (torch.empty(p, device=token_logps.device) for _ in range(5))
    if r + p > 0:
        with torch.cuda.device_of(token_logps):  # Triton launches on the current device
            _preference_loss_kernel[(r + p,)](
                token_logps, ref_token_logps, ref_logps, cu_responses.contiguous(), pairs,
                logps, losses, *rest,
                r, len(token_logps), token_logps.stride(0),
                0 if ref_token_logps is None else ref_token_logps.stride(0),
                0 if ref_logps is None else ref_logps.stride(0), *pairs.stride(),
                beta, label_smoothing,
                LOSS=LOSSES[loss_type], BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return PreferenceForward(losses, rest[0], rest[1], logps, rest[2], rest[3])
