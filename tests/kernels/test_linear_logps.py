"""How exact `linear_logps` is, in torch: against the fp64 oracle of `numerics`, within its budgets.

Shapes: N around a tile edge and 0, V one off tile edges, D odd; sizes beyond a few thousand are
left to the benchmarks. The Triton implementation has its own tests.
"""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo_kernels import (
    linear_logps,
    linear_logps_call,
    linear_logps_torch,
    linear_logps_torch_tiles,
)
from tests import numerics
from tests.kernels.linear_logps_cases import FLOATS, SMALL, TRANSFORMS
from tests.numerics import Head, far_head, flat_head, negative_head, peaked_head, run


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Heads here are tiny, but not for that: the way of large ones is tested."""
    monkeypatch.setattr(linear_logps_call, "is_tiny", lambda *args, **kwargs: False)


def check(head: Head, *, workspace_bytes: int = 256 * 2**20, **transform) -> None:
    actual = run(linear_logps, head, impl="torch", workspace_bytes=workspace_bytes, **transform)
    numerics.assert_logps_close(head, actual.logps, **transform)
    numerics.assert_grads_close(head, actual, **transform)
    numerics.assert_stats_close(head, actual.stats, **transform)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_peaked_logits(dtype, transform, bias):
    head = peaked_head(129, 65, 1025, dtype=dtype, bias=bias, ignored=0.1)
    check(head, **transform)
    check(head, workspace_bytes=SMALL, **transform)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", ["torch", "auto"], ids=["torch", "eager"])
def test_every_subset_of_gradients(impl, dtype, monkeypatch):
    if impl == "auto":
        monkeypatch.undo()  # tiny problems go their own way again
    head = peaked_head(33, 17, 130, dtype=dtype, bias=True, ignored=0.1)
    names = ("hidden", "weight", "bias")
    subsets = [s for k in range(4) for s in itertools.combinations(names, k)]
    op = functools.partial(linear_logps, impl=impl)
    numerics.assert_each_gradient_alone(op, head, subsets, softcap=20.0)


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
    beside = linear_logps(mixed.hidden, mixed.weight, mixed.targets)[::2]
    alone = Head(ordinary.hidden, far.weight, ordinary.targets, None, ordinary.grad)
    numerics.assert_logps_close(alone, beside)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_frame_near_the_maximum_serves_all_rows(dtype, transform, monkeypatch):
    """As on a GPU, where no row's overflow is waited for."""
    monkeypatch.setattr(linear_logps_torch, "OVERFLOW", 0.0)
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

    monkeypatch.setattr(linear_logps_torch, "OVERFLOW", 0.0)
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
