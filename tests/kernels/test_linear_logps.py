"""`linear_logps` on CPU: every promise of its docstring, against the fp64 oracle of `numerics`.

Shapes: N around a tile edge and 0, V one off tile edges, D odd; sizes beyond a few thousand are
left to the benchmarks. The Triton implementation has its own tests.
"""

import importlib
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastdpo_kernels import (
    impls,
    linear_logps,
    linear_logps_torch,
    linear_logps_torch_tiles,
)
from fastdpo_kernels.impls import STATS
from fastdpo_kernels.reference import linear_logps_reference
from tests import numerics
from tests.numerics import Head, far_head, flat_head, negative_head, peaked_head, run

TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": 0.3, "temperature": 0.8},
    "softcap": {"softcap": 15.0, "scale": 1.7, "temperature": 1.3},
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Small enough for several tiles each way at the sizes here, large enough for the least tile.
SMALL = 2 * 2**20


def check(head: Head, *, workspace_bytes: int = 256 * 2**20, **transform) -> None:
    actual = run(linear_logps, head, impl="torch", workspace_bytes=workspace_bytes, **transform)
    numerics.assert_logps_close(head, actual.logps, **transform)
    numerics.assert_grads_close(head, actual, **transform)
    numerics.assert_stats_close(head, actual.stats, **transform)


# --- accuracy


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_peaked_logits(dtype, transform, bias):
    head = peaked_head(129, 65, 1025, dtype=dtype, bias=bias, ignored=0.1)
    check(head, **transform)
    check(head, workspace_bytes=SMALL, **transform)


@pytest.mark.parametrize("n", [0, 1, 127, 129])
@pytest.mark.parametrize("v", [1, 2, 127, 4097])
def test_row_and_vocabulary_edges(n, v):
    check(peaked_head(n, 33, v, bias=True, seed=n + v))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_flat_logits(dtype):
    check(flat_head(64, 48, 2049, dtype=dtype))


@pytest.mark.parametrize("gap", [79, 81, 95, 130, 3000])
@pytest.mark.parametrize("transform", [{}, {"softcap": 5000.0}], ids=["plain", "softcap"])
def test_targets_far_below_the_largest_logit(gap, transform):
    """logp << -100: exp(z - z_y) overflows, and both weight-gradient algorithms must survive it."""
    head = far_head(70, 40, 801, gap=gap)
    assert linear_logps(head.hidden, head.weight, head.targets).max() < 20 - gap
    check(head, **transform)
    check(head, workspace_bytes=SMALL, **transform)


def test_only_some_rows_overflow():
    ordinary, far = peaked_head(50, 40, 801), far_head(50, 40, 801, gap=500)
    mixed = Head(
        torch.stack([ordinary.hidden, far.hidden], 1).flatten(0, 1),
        far.weight,
        torch.stack([ordinary.targets, far.targets], 1).flatten(),
        None,
        torch.cat([ordinary.grad, far.grad]),
    )
    check(mixed)
    alone = linear_logps(ordinary.hidden, far.weight, ordinary.targets)
    beside = linear_logps(mixed.hidden, mixed.weight, mixed.targets)[::2]
    torch.testing.assert_close(alone, beside, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_frame_near_the_maximum_serves_all_rows(dtype, transform, monkeypatch):
    """As on a GPU, where no row's overflow is waited for."""
    monkeypatch.setattr(linear_logps_torch, "_OVERFLOW", 0.0)
    check(peaked_head(129, 65, 1025, dtype=dtype, bias=True, ignored=0.1), **transform)
    check(flat_head(64, 48, 2049, dtype=dtype), workspace_bytes=SMALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("workspace_bytes", [256 * 2**20, SMALL], ids=["kept", "again"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gemms_of_16_bit_operands(dtype, workspace_bytes, transform, monkeypatch):
    """The way of a GPU, with its fp32-result GEMM emulated: E is rounded to be multiplied."""

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == dtype
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(linear_logps_torch, "_OVERFLOW", 0.0)
    monkeypatch.setattr(linear_logps_torch_tiles.Head, "halves", property(lambda head: True))
    monkeypatch.setattr(torch, "mm", mm)
    for head in (
        peaked_head(129, 65, 1025, dtype=dtype, bias=True, ignored=0.1),
        flat_head(64, 48, 2049, dtype=dtype),
        far_head(70, 40, 801, gap=200, dtype=dtype),
    ):
        actual = run(linear_logps, head, workspace_bytes=workspace_bytes, **transform)
        numerics.assert_logps_close(head, actual.logps, **transform)
        # E, and for dW in bf16 the scaled hidden rows: half an ulp each. fp16 rounds what is below
        # 2^-14 of its range by 2^-25 at most, in each of V columns; E is scaled by 2^14 there.
        lost = head.weight.shape[0] * 2.0**-39 if dtype == torch.float16 else 0.0
        e_ulp = numerics.ULP[dtype] + lost
        numerics.assert_grads_close(head, actual, e_ulp=e_ulp, **transform)
        numerics.assert_stats_close(head, actual.stats, **transform)


@pytest.mark.parametrize("level", [100, 3000])
def test_all_logits_strongly_negative(level):
    check(negative_head(65, 40, 801, level=level))


def test_near_certain_targets_keep_their_relative_precision():
    """As p_y -> 1, logp = -(1 - p_y), below any ulp of 1; its relative error is that of exp(z)."""
    head = peaked_head(64, 256, 513)
    rows = head.weight[head.targets]
    hidden = head.hidden + 40 * rows / rows.square().sum(1, keepdim=True)
    hidden.requires_grad_()
    logps = linear_logps(hidden, head.weight, head.targets)
    (grad,) = torch.autograd.grad(logps.sum(), hidden)

    h, w, at = hidden.detach().double(), head.weight.double(), head.targets[:, None]
    z = h @ w.T
    odds = (z - z.gather(1, at)).exp().scatter(1, at, 0)  # p_v / p_y for v != y
    want = -odds.sum(1).log1p()
    differences = w[head.targets][:, None] - w  # [N, V, D]
    want_grad = (odds[:, :, None] * differences).sum(1) / (1 + odds.sum(1))[:, None]
    sure = want > -1e-8
    assert sure.sum() > 10 and want.max() > -1e-14
    # Two logits, each half an ulp of z and of the partial sums it passed through (|h| |w| = 112),
    # and a few roundings more. Measured: 7e-6 and 6e-6.
    allowed = 2 * (z.abs().max() + h.norm(dim=1).max() * w.norm(dim=1).max() + 4) * 2**-24
    assert (logps.double() / want - 1).abs()[sure].max() < allowed
    error = (grad.double() - want_grad).norm(dim=1) / want_grad.norm(dim=1)
    assert error[sure].max() < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_response_of_256_tokens_errs_below_a_milli_nat(dtype):
    head = peaked_head(512, 256, 8191, dtype=dtype)
    error = linear_logps(head.hidden, head.weight, head.targets) - numerics.exact(head).logps
    assert error.view(2, 256).sum(1).abs().max() < 1e-3


def test_the_budget_can_fail():
    """16-bit logits, the error that this op exists to avoid, are far outside it."""
    head = peaked_head(64, 64, 1001, dtype=torch.bfloat16)
    rounded = torch.log_softmax((head.hidden @ head.weight.T).float(), -1)
    logps = rounded.gather(1, head.targets[:, None]).squeeze(1)
    with pytest.raises(AssertionError, match="of its budget"):
        numerics.assert_logps_close(head, logps)
    outcome = run(linear_logps, head)
    wrong = numerics.Outcome(
        outcome.logps, outcome.d_hidden * 1.05, outcome.d_weight, None, outcome.stats
    )
    with pytest.raises(AssertionError, match="d_hidden error"):
        numerics.assert_grads_close(head, wrong)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 30),
    d=st.integers(1, 40),
    v=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 4.0, 30.0]),
    scale=st.floats(0.1, 2.0),
    temperature=st.floats(0.5, 2.0),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    tile=st.tuples(st.integers(4, 30), st.integers(30, 300)),
    seed=st.integers(0, 10**6),
)
def test_any_shape(n, d, v, dtype, bias, softcap, scale, temperature, ignored, tile, seed):
    head = peaked_head(n, d, v, dtype=dtype, bias=bias, ignored=ignored, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_logps_torch_tiles, "ROWS", tile[0])
        patch.setattr(linear_logps_torch_tiles, "COLS", tile[1])
        check(head, softcap=softcap, scale=scale, temperature=temperature)


# --- gradients


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradcheck(impl, transform, monkeypatch):
    monkeypatch.setattr(linear_logps_torch_tiles, "ROWS", 3)
    monkeypatch.setattr(linear_logps_torch_tiles, "COLS", 4)
    head = peaked_head(5, 3, 11, dtype=torch.float64, bias=True)
    targets = head.targets.clone()
    targets[1] = -100
    tensors = [t.requires_grad_() for t in (head.hidden, head.weight, head.bias) if t is not None]
    for workspace in (2**20, 7000):  # E kept, and computed again

        def of(hidden, weight, bias, workspace=workspace):
            return linear_logps(
                hidden,
                weight,
                targets,
                bias=bias,
                impl=impl,
                workspace_bytes=workspace,
                **transform,
            )

        assert torch.autograd.gradcheck(of, tensors)


def saved_kept(head: Head, workspace_bytes: int) -> bool:
    result = linear_logps_torch.forward(
        head.hidden,
        head.weight,
        head.targets,
        bias=None,
        softcap=None,
        scale=1.0,
        temperature=1.0,
        ignore_index=-100,
        stats=(),
        need_hidden_grad=True,
        need_weight_grad=True,
        workspace_bytes=workspace_bytes,
    )
    return len(result.saved) == 4


def test_weight_gradient_by_kept_exponentials_and_by_recomputing_agree():
    head = peaked_head(200, 64, 2049, ignored=0.1)
    assert saved_kept(head, 256 * 2**20) and not saved_kept(head, SMALL)
    kept = run(linear_logps, head)
    again = run(linear_logps, head, workspace_bytes=SMALL)
    torch.testing.assert_close(kept.d_weight, again.d_weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "none"])
def test_only_the_gradients_asked_for_are_computed(wanted, monkeypatch):
    head = peaked_head(20, 16, 101, bias=True)
    assert head.bias is not None
    inputs = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    if wanted != "none":
        inputs[wanted].requires_grad_()
    results, grads = [], []
    forward, weight_grad = linear_logps_torch.forward, linear_logps_torch.weight_grad
    monkeypatch.setattr(
        linear_logps_torch,
        "forward",
        lambda *a, **k: results.append(forward(*a, **k)) or results[-1],
    )
    monkeypatch.setattr(
        linear_logps_torch,
        "weight_grad",
        lambda *a, **k: grads.append(weight_grad(*a, **k)) or grads[-1],
    )
    logps = linear_logps(head.hidden, head.weight, head.targets, bias=head.bias)
    assert (results[0].hidden_grad is None) == (wanted != "hidden")
    assert bool(results[0].saved) == (wanted in ("weight", "bias"))
    assert logps.requires_grad == (wanted != "none")
    if wanted == "none":
        return
    logps.sum().backward()
    assert bool(grads) == (wanted in ("weight", "bias"))
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name == wanted)
    with torch.no_grad():
        linear_logps(head.hidden, head.weight, head.targets, bias=head.bias)
    assert results[1].hidden_grad is None and not results[1].saved


def test_a_frozen_head_keeps_only_the_gradient_for_the_backward_pass():
    head = peaked_head(20, 16, 101)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_logps(head.hidden.requires_grad_(), head.weight, head.targets)
    assert sorted(t.numel() for t in kept) == [0, 20 * 16]


@pytest.mark.parametrize("ignored", [0.0, 1.0])
@pytest.mark.parametrize("n", [0, 5])
def test_no_rows_and_all_rows_ignored_are_differentiable(n, ignored):
    if n and not ignored:
        return
    head = peaked_head(n, 8, 33, bias=True, ignored=ignored)
    actual = run(linear_logps, head)
    assert actual.logps.shape == (n,) and actual.logps.eq(0).all()
    assert actual.d_hidden.shape == (n, 8) and actual.d_hidden.eq(0).all()
    assert actual.d_weight.eq(0).all()
    assert actual.d_bias is not None and actual.d_bias.eq(0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_ignored_rows_may_hold_anything(poison):
    head = peaked_head(40, 16, 101, bias=True, ignored=0.3)
    ignored = head.targets == -100
    clean = run(linear_logps, head)
    dirty = head.hidden.masked_fill(ignored[:, None], poison)
    actual = run(linear_logps, Head(dirty, head.weight, head.targets, head.bias, head.grad))
    assert actual.logps[ignored].eq(0).all() and actual.d_hidden[ignored].eq(0).all()
    assert torch.equal(actual.logps, clean.logps)
    assert torch.equal(actual.d_weight, clean.d_weight)


def test_a_row_that_is_not_a_number_spoils_no_other():
    head = peaked_head(40, 16, 101)
    clean = linear_logps(head.hidden, head.weight, head.targets)
    hidden = head.hidden.clone()
    hidden[7, 3] = math.nan
    got = linear_logps(hidden, head.weight, head.targets)
    assert got[7].isnan()
    rest = torch.arange(40) != 7
    assert torch.equal(got[rest], clean[rest])


def test_masked_vocabulary_through_an_infinite_bias():
    """A bias of -inf takes a column out: the log-probs are those of the smaller vocabulary."""
    head = peaked_head(40, 16, 101)
    keep = torch.ones(101, dtype=torch.bool)
    keep[50:60] = False
    targets = head.targets.clamp(max=49)
    bias = torch.zeros(101).masked_fill(~keep, -math.inf)
    got, stats = linear_logps(head.hidden, head.weight, targets, bias=bias, stats=("entropy",))
    want, small = linear_logps(head.hidden, head.weight[keep], targets, stats=("entropy",))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy, small.entropy, rtol=1e-5, atol=1e-5)
    never = torch.full_like(targets, 55)
    got, stats = linear_logps(head.hidden, head.weight, never, bias=bias, stats=("entropy",))
    assert got.isneginf().all()
    torch.testing.assert_close(stats.entropy, small.entropy, rtol=1e-5, atol=1e-5)


def test_strided_inputs():
    head = peaked_head(33, 24, 257)
    want = run(linear_logps, head)
    hidden = torch.stack([head.hidden, head.hidden], 2)[:, :, 1]  # stride 2 within a row
    weight = head.weight.T.contiguous().T  # column-major
    targets = torch.stack([head.targets, head.targets], 1)[:, 0]
    got = run(linear_logps, Head(hidden, weight, targets, None, head.grad))
    assert not (hidden.is_contiguous() or weight.is_contiguous() or targets.is_contiguous())
    torch.testing.assert_close(got.logps, want.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.d_hidden, want.d_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.d_weight, want.d_weight, rtol=1e-5, atol=1e-5)
    hidden = head.hidden.detach().requires_grad_()
    linear_logps(hidden, head.weight, head.targets).sum().backward()  # an expanded gradient
    assert hidden.grad is not None


def test_tied_weights_get_both_gradients():
    head = peaked_head(30, 16, 101, dtype=torch.float64)
    ids = torch.arange(30) % 101

    def gradient(op):
        table = head.weight.detach().requires_grad_()
        op(table[ids], table, head.targets).sum().backward()
        return table.grad

    want = gradient(lambda *a: linear_logps_reference(*a)[0])
    torch.testing.assert_close(gradient(linear_logps), want)


def test_gradients_scale_exactly_with_a_loss_scale():
    head = peaked_head(30, 16, 101, dtype=torch.float16, weight_dtype=torch.float32)
    small = run(linear_logps, head)
    large = run(
        linear_logps, Head(head.hidden, head.weight, head.targets, None, head.grad * 2.0**10)
    )
    assert torch.equal(large.d_weight, small.d_weight * 2.0**10)


def test_backward_twice_through_a_retained_graph():
    for workspace in (256 * 2**20, SMALL):
        head = peaked_head(200, 64, 2049)
        head.hidden.requires_grad_()
        head.weight.requires_grad_()
        logps = linear_logps(head.hidden, head.weight, head.targets, workspace_bytes=workspace)
        first = torch.autograd.grad(logps.sum(), (head.hidden, head.weight), retain_graph=True)
        second = torch.autograd.grad(logps.sum(), (head.hidden, head.weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inside_gradient_checkpointing():
    head = peaked_head(30, 16, 101)
    want = run(linear_logps, head, stats=())
    hidden = head.hidden.detach().requires_grad_()
    logps = checkpoint(linear_logps, hidden, head.weight, head.targets, use_reentrant=False)
    logps.backward(head.grad)
    assert hidden.grad is not None and torch.equal(hidden.grad, want.d_hidden)


def test_twice_gives_the_same_bits():
    for workspace in (256 * 2**20, SMALL):
        head = peaked_head(300, 48, 2049, bias=True)
        a = run(linear_logps, head, workspace_bytes=workspace)
        b = run(linear_logps, head, workspace_bytes=workspace)
        assert torch.equal(a.logps, b.logps) and torch.equal(a.d_hidden, b.d_hidden)
        assert torch.equal(a.d_weight, b.d_weight)
        assert a.d_bias is not None and b.d_bias is not None and torch.equal(a.d_bias, b.d_bias)


def test_statistics_leave_the_log_probs_as_they_are():
    head = peaked_head(100, 48, 1001)
    for transform in TRANSFORMS.values():
        bare = linear_logps(head.hidden, head.weight, head.targets, **transform)
        every, stats = linear_logps(
            head.hidden, head.weight, head.targets, stats=STATS, **transform
        )
        assert torch.equal(bare, every)
        one, only = linear_logps(
            head.hidden, head.weight, head.targets, stats=["entropy"], **transform
        )
        assert only.mean_logits is None and only.is_top1 is None
        assert only.entropy is not None and stats.entropy is not None
        assert torch.equal(only.entropy, stats.entropy) and torch.equal(one, bare)
        assert not stats.entropy.requires_grad


@pytest.mark.parametrize("cols", [1, 2, 4])
def test_top1_counts_the_first_of_equal_logits(cols, monkeypatch):
    monkeypatch.setattr(linear_logps_torch_tiles, "COLS", cols)
    weight = torch.tensor([[0.0], [1.0], [1.0], [-1.0]])
    hidden = torch.ones(4, 1)
    _, stats = linear_logps(hidden, weight, torch.arange(4), stats=("is_top1",))
    assert stats.is_top1 is not None and stats.is_top1.tolist() == [False, True, False, False]


# --- work


class CountMatmuls(TorchDispatchMode):
    """Adds up the multiplications of every matrix product."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.products += result.numel() * args[1].shape[1]
        elif func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.products += result.numel() * args[0].shape[-1]
        return result


@pytest.mark.parametrize(
    ("grads", "workspace_bytes", "gemms"),
    [
        ((), SMALL, 1),
        (("hidden",), SMALL, 2),
        (("hidden", "weight"), 256 * 2**20, 3),
        (("hidden", "weight"), SMALL, 4),
        (("weight",), 256 * 2**20, 2),
    ],
)
def test_number_of_gemms(grads, workspace_bytes, gemms):
    n, d, v = 300, 64, 2049
    head = peaked_head(n, d, v)
    head.hidden.requires_grad_("hidden" in grads)
    head.weight.requires_grad_("weight" in grads)
    with CountMatmuls() as count:
        logps = linear_logps(
            head.hidden, head.weight, head.targets, workspace_bytes=workspace_bytes, stats=STATS
        )[0]
        if grads:
            logps.sum().backward()
    assert count.products == gemms * n * d * v


# --- dtypes and autocast


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_mixed_dtypes_multiply_in_that_of_hidden(hidden, weight):
    head = peaked_head(64, 33, 501, dtype=hidden, weight_dtype=weight, bias=True)
    actual = run(linear_logps, head)
    numerics.assert_logps_close(_rounded(head), actual.logps)
    numerics.assert_grads_close(_rounded(head), actual)
    assert actual.d_hidden.dtype == hidden and actual.d_weight.dtype == weight


def _rounded(head: Head) -> Head:
    return Head(head.hidden, head.weight.to(head.hidden.dtype), head.targets, head.bias, head.grad)


def test_autocast_rounds_hidden_as_linear_would_and_nothing_else():
    head = peaked_head(64, 33, 501, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(linear_logps, head)
        oracle = run(linear_logps, head, impl="reference")
    rounded = Head(head.hidden.bfloat16(), head.weight, head.targets, head.bias, head.grad)
    outside = run(linear_logps, rounded)
    assert torch.equal(under.logps, outside.logps) and under.logps.dtype == torch.float32
    assert torch.equal(under.d_weight, outside.d_weight)
    assert torch.equal(under.d_hidden.bfloat16(), outside.d_hidden)
    torch.testing.assert_close(under.logps, oracle.logps, rtol=1e-5, atol=1e-5)
    double = peaked_head(4, 8, 33, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_logps(double.hidden, double.weight, double.targets).dtype == torch.float64


# --- memory


def _bytes(event: Any) -> int:
    return event.nbytes()  # of a "[memory]" event: negative when freed


def peak_bytes(run_it) -> int:
    """The largest sum of live allocations that `run_it` made, by the allocator's own account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run_it()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), _bytes(e)) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace_bytes", [2**21, 2**24])
def test_peak_memory_is_the_workspace_and_the_results(trained, dtype, workspace_bytes):
    n, d, v = 512, 32, 16384
    head = peaked_head(n, d, v, dtype=dtype)
    head.hidden.requires_grad_()
    head.weight.requires_grad_(trained)
    stats = ("entropy", "log_sum_sq_probs")

    def step():
        logps, _ = linear_logps(
            head.hidden, head.weight, head.targets, workspace_bytes=workspace_bytes, stats=stats
        )
        logps.sum().backward()

    size = dtype.itemsize
    # hidden's gradient unscaled, scaled in fp32 and returned; the weight's; two dozen [N] vectors
    results = n * d * (2 * size + 4) + (v * d * size if trained else 0) + 24 * 8 * n
    assert peak_bytes(step) <= workspace_bytes + results
    assert workspace_bytes + results < n * v * 4  # less than one [N, V] of logits


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_peak_memory_when_every_row_overflows(trained):
    n, d, v, workspace_bytes = 512, 32, 4096, 3 * 2**22
    head = far_head(n, d, v, gap=200)
    assert saved_kept(head, workspace_bytes)
    head.hidden.requires_grad_()
    head.weight.requires_grad_(trained)

    def step():
        logps = linear_logps(
            head.hidden, head.weight, head.targets, workspace_bytes=workspace_bytes
        )
        logps.sum().backward()

    results = n * d * 12 + v * d * 4 * trained + 24 * 8 * n
    assert peak_bytes(step) <= workspace_bytes + results


def test_peak_memory_is_a_quarter_of_eager():
    head = peaked_head(2048, 64, 4000)
    head.hidden.requires_grad_()

    def eager():
        z = head.hidden @ head.weight.T
        logps = torch.log_softmax(z, -1).gather(1, head.targets[:, None])
        logps.sum().backward()

    ours = peak_bytes(lambda: linear_logps(head.hidden, head.weight, head.targets).sum().backward())
    assert ours <= peak_bytes(eager) / 4


def test_a_workspace_too_small_says_what_it_takes():
    head = peaked_head(100, 64, 1000)
    with pytest.raises(ValueError, match=r"leaves 10000 bytes.*D=64, V=1000 need (\d+)") as error:
        linear_logps(head.hidden, head.weight, head.targets, workspace_bytes=10_000)
    need = int(str(error.value).split("need ")[1].split(";")[0])
    linear_logps(head.hidden, head.weight, head.targets, workspace_bytes=need)


# --- choice of implementation, and what is refused


def test_auto_runs_torch_on_a_cpu_and_says_so_once(caplog):
    impls._log_choice.cache_clear()
    head = peaked_head(3, 8, 33)
    with caplog.at_level(logging.INFO, "fastdpo_kernels"):
        auto = linear_logps(head.hidden, head.weight, head.targets)
        linear_logps(head.hidden, head.weight, head.targets)
    assert [r.message for r in caplog.records] == [
        "linear_logps: impl=auto runs torch on cpu float32 (CPU tensors)"
    ]
    assert torch.equal(auto, linear_logps(head.hidden, head.weight, head.targets, impl="torch"))


def test_triton_by_name_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    head = peaked_head(3, 8, 33)
    with pytest.raises(RuntimeError, match='impl="triton" cannot run here'):
        linear_logps(head.hidden, head.weight, head.targets, impl="triton")


def test_double_backward_is_refused_by_name():
    for frozen in (True, False):
        head = peaked_head(5, 8, 33)
        hidden = head.hidden.detach().requires_grad_()
        weight = head.weight.detach().requires_grad_(not frozen)
        logps = linear_logps(hidden, weight, head.targets)
        (grad,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_logps has no second derivative"):
            torch.autograd.grad(grad.square().sum(), hidden)
    reference = linear_logps(hidden, weight, head.targets, impl="reference")
    (grad,) = torch.autograd.grad(reference.sum(), hidden, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), hidden)[0].abs().sum() > 0


def test_function_transforms_are_refused_by_name():
    head = peaked_head(6, 8, 33)
    with pytest.raises(RuntimeError, match="linear_logps does not work under torch.func"):
        torch.func.vmap(linear_logps, in_dims=(0, None, 0))(
            head.hidden.view(2, 3, 8), head.weight, head.targets.view(2, 3)
        )
    with pytest.raises(RuntimeError, match="linear_logps does not work under torch.func"):
        torch.func.grad(lambda h: linear_logps(h, head.weight, head.targets).sum())(head.hidden)


def test_torch_compile_calls_it_from_the_graph():
    head = peaked_head(6, 8, 33)
    want = linear_logps(2 * head.hidden, head.weight, head.targets).sum()
    compiled = torch.compile(
        lambda h, w, y: linear_logps(2 * h, w, y).sum(), backend="eager", dynamic=False
    )
    assert torch.equal(compiled(head.hidden, head.weight, head.targets), want)


class Params4bit(torch.nn.Parameter):
    """Stands for bitsandbytes' class of that name."""


class DTensor(Tensor):
    """Stands for torch.distributed.tensor.DTensor."""


def bad_calls():
    h, w, y = torch.randn(4, 8), torch.randn(33, 8), torch.arange(4)
    shard = torch.empty(0)
    shard.ds_id = 3  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "D": ((h, torch.randn(33, 9), y), {}, ValueError, r"D=9 \(weight\), got 8 \(hidden\)"),
        "rank": ((h[None], w, y), {}, ValueError, r"hidden must have 2 dim.*\(1, 4, 8\)"),
        "N": ((h, w, y[:3]), {}, ValueError, "expected 4 targets .* got 3"),
        "V": ((h, w, y), {"bias": torch.zeros(32)}, ValueError, "expected 33 biases .* got 32"),
        "empty": ((h, w[:0], y), {}, ValueError, r"weight is empty: \(0, 8\)"),
        "int32": ((h, w, y.int()), {}, TypeError, "targets must be int64, got torch.int32"),
        "uint8": ((h, w.to(torch.uint8), y), {}, TypeError, "weight is torch.uint8"),
        "fp64": ((h.double(), w, y), {}, TypeError, "float64 mixes with nothing"),
        "device": ((h, w.to("meta"), y), {}, ValueError, "weight is on meta, hidden on cpu"),
        "list": ((h, w, [1, 2]), {}, TypeError, "targets must be a tensor, got list"),
        "high": ((h, w, y + 30), {}, ValueError, r"targets\[3\] = 33 is outside \[0, V=33\)"),
        "low": ((h, w, y - 2), {}, ValueError, r"targets\[0\] = -2 is outside"),
        "4-bit": ((h, Params4bit(w), y), {}, TypeError, "weight is a bitsandbytes Params4bit"),
        "DTensor": ((h, w.as_subclass(DTensor), y), {}, TypeError, "full_tensor"),
        "ZeRO-3": ((h, shard, y), {}, TypeError, "ZeRO-3 shard"),
        "softcap": ((h, w, y), {"softcap": 0.0}, ValueError, "softcap must be positive"),
        "temperature": ((h, w, y), {"temperature": -1}, ValueError, "temperature must be pos"),
        "scale": ((h, w, y), {"scale": math.inf}, ValueError, "scale must be finite"),
        "stat": ((h, w, y), {"stats": ("entropi",)}, ValueError, "called 'entropi'"),
        "stats": ((h, w, y), {"stats": ("entropy",) * 2}, ValueError, "names one twice"),
        "impl": ((h, w, y), {"impl": "cuda"}, ValueError, "impl='cuda' is unknown"),
        "workspace": ((h, w, y), {"workspace_bytes": 0}, ValueError, "must be positive, got 0"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name):
    args, options, error, message = bad_calls()[name]
    with pytest.raises(error, match=message) as caught:
        linear_logps(*args, **options)
    assert str(caught.value).startswith("linear_logps: ") and "\n" not in str(caught.value)


def test_other_ignore_indices():
    head = peaked_head(5, 8, 33)
    targets = torch.tensor([3, 0, 7, 0, 1])
    logps = linear_logps(head.hidden, head.weight, targets, ignore_index=0)
    assert logps[[1, 3]].eq(0).all() and logps[[0, 2, 4]].lt(0).all()
    with pytest.raises(ValueError, match=r"targets\[1\] = -100 .* ignore_index=0"):
        linear_logps(
            head.hidden, head.weight, targets.masked_fill(targets == 0, -100), ignore_index=0
        )


def test_a_devices_late_report_of_a_bad_target_is_raised_when_it_has_arrived():
    """On a GPU the host learns of a bad target later; here with a stand-in for its event."""
    module = importlib.import_module("fastdpo_kernels.linear_logps")

    class Event:
        ready = False

        def query(self):
            return self.ready

    event = Event()
    module._pending.append((event, torch.tensor([0, 0, 5]), 33, -100))
    module._pending.append((event, torch.tensor([1, 7, 40]), 33, -100))
    module._raise_bad_targets()
    event.ready = True
    with pytest.raises(ValueError, match=r"earlier call.*targets\[7\] = 40 is outside \[0, V=33\)"):
        module._raise_bad_targets()
    assert not module._pending
    targets, bad = module._check_targets(torch.tensor([0, 40], device="meta"), 33, -100)
    assert bad is not None and targets.device.type == "meta"


# --- on a GPU (the Triton implementation has its own tests)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torch_on_a_gpu(dtype):
    for head in (
        peaked_head(129, 72, 1032, dtype=dtype, bias=True, ignored=0.1),
        far_head(64, 40, 808, gap=200, dtype=dtype),
    ):
        tensors = [None if t is None else t.cuda() for t in vars(head).values()]
        there = Head(*tensors)  # pyright: ignore[reportArgumentType]
        actual = run(linear_logps, there, impl="torch")
        numerics.assert_logps_close(there, actual.logps)
        rounding = 2 * numerics.ULP[dtype] if dtype.itemsize == 2 else 0.0
        numerics.assert_grads_close(there, actual, e_ulp=rounding)
        numerics.assert_stats_close(there, actual.stats)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_bad_target_on_a_gpu_gives_nan_and_then_an_error():
    hidden, weight = torch.randn(9, 8, device="cuda"), torch.randn(33, 8, device="cuda")
    targets = torch.arange(9, device="cuda")
    targets[4] = 33
    logps = linear_logps(hidden, weight, targets)
    assert logps.isnan().tolist() == [row == 4 for row in range(9)]
    with pytest.raises(ValueError, match=r"earlier call.*targets\[4\] = 33"):
        linear_logps(hidden, weight, targets.clamp(max=32))
    assert linear_logps(hidden, weight, targets.clamp(max=32)).isfinite().all()
