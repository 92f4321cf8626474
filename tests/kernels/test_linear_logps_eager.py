"""`linear_logps` for tiny problems: as exact as elsewhere, and taken where it says it is."""

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fastdpo_kernels import (
    linear_logps,
    linear_logps_call,
    linear_logps_eager,
    linear_logps_torch,
    linear_logps_torch_tiles,
)
from fastdpo_kernels.impls import STATS
from tests import numerics
from tests.kernels.linear_logps_cases import FLOATS, TRANSFORMS, peak_bytes
from tests.numerics import Head, far_head, flat_head, negative_head, peaked_head, run


@pytest.fixture
def eager_alone(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the chunked way ran")

    monkeypatch.setattr(linear_logps_torch, "forward", never)


def check(head: Head, **transform) -> None:
    actual = run(linear_logps, head, **transform)
    numerics.assert_logps_close(head, actual.logps, **transform)
    numerics.assert_grads_close(head, actual, **transform)
    numerics.assert_stats_close(head, actual.stats, **transform)


@pytest.mark.usefixtures("eager_alone")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_within_the_budgets(dtype, transform, ignored):
    check(peaked_head(65, 33, 257, dtype=dtype, bias=True, ignored=ignored), **transform)
    numerics.assert_adapter_close(
        linear_logps, 65, 33, 257, 3, dtype=dtype, ignored=ignored, **transform
    )


@pytest.mark.parametrize(
    "head",
    [
        flat_head(40, 32, 300),
        far_head(40, 32, 300, gap=70),
        far_head(40, 32, 300, gap=130),  # these two by the chunked way
        far_head(40, 32, 300, gap=3000),
        negative_head(40, 32, 300, level=3000),
    ],
    ids=["flat", "far", "overflowing", "farther", "negative"],
)
def test_extremes(head):
    check(head)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 30),
    d=st.integers(1, 40),
    v=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    softcap=st.sampled_from([None, 4.0]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_shape(n, d, v, dtype, softcap, ignored):
    check(peaked_head(n, d, v, dtype=dtype, bias=True, ignored=ignored, seed=n), softcap=softcap)


def test_near_certain_targets_keep_their_relative_precision():
    """As p_y -> 1, logp = -(1 - p_y), below any ulp of 1."""
    head = peaked_head(32, 64, 257)
    rows = head.weight[head.targets]
    hidden = head.hidden + 40 * rows / rows.square().sum(1, keepdim=True)
    got = linear_logps(hidden, head.weight, head.targets).double()
    z = hidden.double() @ head.weight.double().T
    odds = (z - z.gather(1, head.targets[:, None])).exp().scatter(1, head.targets[:, None], 0)
    want = -odds.sum(1).log1p()
    sure = want > -1e-8
    assert sure.sum() > 5
    # Two logits, each half an ulp of z and of its partial sums, |h| |w| at most.
    sums = hidden.norm(dim=1).max() * head.weight.norm(dim=1).max()
    allowed = 2 * (z.abs().max() + sums + 4) * 2**-24
    assert (got / want - 1).abs()[sure].max() < allowed


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_ignored_rows_may_hold_anything(poison):
    head = peaked_head(40, 16, 101, bias=True, ignored=0.3)
    clean = run(linear_logps, head)
    head.hidden[head.targets == -100] = poison
    dirty = run(linear_logps, head)
    assert torch.equal(dirty.logps, clean.logps) and torch.equal(dirty.d_hidden, clean.d_hidden)
    assert torch.equal(dirty.d_weight, clean.d_weight)


def test_a_masked_vocabulary():
    head = peaked_head(40, 16, 101)
    bias = torch.zeros(101)
    bias[50:60] = -math.inf
    got, stats = linear_logps(
        head.hidden, head.weight, head.targets.clamp(max=49), bias=bias, stats=STATS
    )
    keep = bias == 0
    want = torch.log_softmax((head.hidden @ head.weight[keep].T).double(), -1)
    entropy = torch.special.entr(want.exp()).sum(1)
    want = want.gather(1, head.targets.clamp(max=49)[:, None]).squeeze(1)
    # logits of up to 30 nat in fp32 (ulp 2e-6)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert stats.entropy is not None
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_bits_are_those_of_the_chunked_way(transform):
    """So that what decides between the two, the size of a pack, does not show."""
    # One tile, two, and four of the chunked way's; on an x86 with AVX-512 the first of several is
    # oneDNN's product (above 2^25 multiplications), the others MKL's.
    for n, v in ((7, 257), (129, 257), (700, 257), (129, 3000), (700, 3000), (1100, 2100)):
        head = peaked_head(n, 33, v, bias=True)
        tensors, options = (head.hidden, head.weight, head.targets), {"bias": head.bias}
        mine = linear_logps(*tensors, **options, **transform)
        assert torch.equal(mine, linear_logps(*tensors, **options, **transform, impl="torch"))


def test_only_tiny_problems_come_here(eager_alone):
    tiny = functools.partial(
        linear_logps_eager.is_tiny, rounded=torch.float32, joined=False, workspace_bytes=2**28
    )

    def sizes(n, d, v, dtype=torch.float32):
        return torch.empty(n, d), torch.empty(v, d, dtype=dtype)

    assert tiny(*sizes(512, 32, 4096)) and not tiny(*sizes(512, 32, 4097))
    assert not tiny(*sizes(800, 32, 4096))  # 64 MiB
    assert not tiny(*sizes(1, 4096, 4096, torch.bfloat16))  # W would be copied
    assert not linear_logps_eager.is_tiny(
        *sizes(512, 32, 900), torch.float32, joined=False, workspace_bytes=2**20
    )
    hidden, weight = (x.to("meta") for x in sizes(4, 8, 33))
    assert not linear_logps_eager.is_tiny(
        hidden, weight, torch.float32, joined=False, workspace_bytes=2**28
    )
    head = peaked_head(8, 16, 33)
    with pytest.raises(AssertionError, match="the chunked way ran"):
        linear_logps(head.hidden, head.weight, head.targets, impl="torch")


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_it_takes_no_more_memory_than_it_says(transform, monkeypatch, eager_alone):
    n, d, v = 512, 64, 900
    monkeypatch.setattr(linear_logps_eager, "LARGEST_BYTES", 12 * 2**20)
    head = peaked_head(n, d, v)
    head.hidden.requires_grad_()
    head.weight.requires_grad_()

    def step():
        logps, _ = linear_logps(head.hidden, head.weight, head.targets, stats=STATS, **transform)
        logps.sum().backward()

    assert linear_logps_eager.is_tiny(
        head.hidden, head.weight, torch.float32, joined=False, workspace_bytes=12 * 2**20
    )
    results = n * d * 12 + v * d * 4 + 24 * 8 * n
    assert peak_bytes(step) <= linear_logps_eager.LARGEST_BYTES + results


def test_the_call_chooses_it_once_for_all(monkeypatch, eager_alone):
    monkeypatch.setattr(linear_logps_call, "is_tiny", lambda *a, **k: False)
    head = peaked_head(8, 16, 33)
    with pytest.raises(AssertionError, match="the chunked way ran"):
        linear_logps(head.hidden, head.weight, head.targets)


# ---- on a GPU, where the host reads no value


@pytest.fixture
def as_on_a_gpu(monkeypatch, eager_alone):
    monkeypatch.setattr(linear_logps_eager, "_may_wait", lambda device: False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_way_of_a_gpu_is_within_the_budgets(dtype, transform):
    check(peaked_head(65, 33, 257, dtype=dtype, bias=True, ignored=0.2), **transform)
    numerics.assert_adapter_close(
        linear_logps, 65, 33, 257, 3, dtype=dtype, ignored=0.2, **transform
    )


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bit_operands_are_fp32(dtype, monkeypatch):
    """With the fp32-result GEMM of a GPU emulated; no exponential is rounded to 16 bits."""

    def mm(a, b, *, out_dtype):
        assert a.dtype == b.dtype == dtype
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(linear_logps_torch_tiles.Head, "halves", property(lambda head: True))
    monkeypatch.setattr(torch, "mm", mm)
    for transform in TRANSFORMS.values():
        check(peaked_head(65, 33, 257, dtype=dtype, bias=True, ignored=0.1), **transform)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("gap", [70, 130, 3000])
def test_no_row_overflows_on_a_gpu(gap):
    check(far_head(40, 32, 300, gap=gap))
    check(negative_head(40, 32, 300, level=gap))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_vocabulary_of_one_and_no_rows_on_a_gpu():
    check(peaked_head(5, 8, 1))
    check(peaked_head(0, 8, 33))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_masked_vocabulary_on_a_gpu():
    test_a_masked_vocabulary()
    head = peaked_head(40, 16, 101)
    bias = torch.zeros(101)
    bias[50:60] = -math.inf
    never = torch.full_like(head.targets, 55)
    got, stats = linear_logps(head.hidden, head.weight, never, bias=bias, stats=("entropy",))
    assert got.isneginf().all() and stats.entropy is not None and stats.entropy.isfinite().all()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_near_certain_targets_on_a_gpu():
    test_near_certain_targets_keep_their_relative_precision()


OPTIONS: dict[str, Any] = {
    "rounded": torch.float32,
    "adapter": None,
    "softcap": 5.0,
    "scale": 1.0,
    "temperature": 1.0,
    "ignore_index": -100,
    "workspace_bytes": 2**28,
}
HEAD: dict[str, Any] = {"need_weight_grad": True, "need_bias_grad": True}
EVERY = {"need_hidden_grad": True, **HEAD, "keep": True, "stats": STATS}


def test_the_host_reads_nothing_on_a_gpu():
    """Meta tensors hold no values: whatever reads one, or needs one for a shape, raises."""
    head = peaked_head(40, 16, 101, bias=True)
    hidden, weight, targets, bias = (
        t.to("meta") for t in (head.hidden, head.weight, head.targets, head.bias) if t is not None
    )
    got = linear_logps_eager.forward(hidden, weight, targets, bias=bias, **OPTIONS, **EVERY)
    assert got.token_logps.shape == (40,) and got.hidden_grad is not None and got.stats is not None
    dw, db = linear_logps_eager.weight_grad(
        hidden, weight, targets, got.saved, got.token_logps, bias=bias, **OPTIONS, **HEAD
    )
    assert dw is not None and dw.shape == (101, 16) and db is not None and db.shape == (101,)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_target_outside_the_vocabulary_gives_nan_on_a_gpu():
    head = peaked_head(40, 16, 101, ignored=0.2)
    targets = head.targets.clone()
    bad = torch.zeros(40, dtype=torch.bool)
    for row, target in ((0, 101), (17, -1), (39, 2**40)):
        targets[row], bad[row] = target, True
    got = linear_logps_eager.forward(
        head.hidden, head.weight, targets, bias=None, **OPTIONS, **EVERY
    )
    assert torch.equal(got.token_logps.isnan(), bad)
    assert got.hidden_grad is not None and not got.hidden_grad[bad].any()
    dw, _ = linear_logps_eager.weight_grad(
        head.hidden, head.weight, targets, got.saved, head.grad, bias=None, **OPTIONS, **HEAD
    )
    assert dw is not None and dw.isfinite().all()


def test_what_auto_takes_on_a_gpu():
    with FakeTensorMode():

        def chosen(n, d, v, dtype=torch.bfloat16, **changes):
            hidden = torch.empty(n, d, dtype=dtype, device="cuda")
            weight = torch.empty(v, d, dtype=dtype, device="cuda")
            call = linear_logps_call.Call(
                impl="auto", rounded=dtype, softcap=None, scale=1.0, temperature=1.0,
                ignore_index=-100, stats=(), workspace_bytes=changes.pop("workspace", 2**28),
                need_hidden_grad=True, need_weight_grad=False, need_bias_grad=False,
            )  # fmt: skip
            return call.chosen(hidden, weight, None, tiny=True).impl == "eager"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_logps_call, "choose_impl", lambda *args: "triton")
            assert chosen(256, 128, 8000) and chosen(1, 64, 32000)
            assert not chosen(263, 64, 8000)  # N V above 2^21
            assert chosen(1400, 500, 1400, torch.float32)
            assert not chosen(1400, 560, 1400, torch.float32)  # N V D above 2^30
            assert not chosen(1, 4096, 32000)  # a copy of W in fp32
            assert not chosen(256, 128, 8000, workspace=2**24)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_it_takes_no_more_memory_than_it_says_on_a_gpu(monkeypatch):
    test_it_takes_no_more_memory_than_it_says(TRANSFORMS["softcap"], monkeypatch, None)


@pytest.mark.parametrize("gpu", [False, True])
def test_inside_a_compiled_graph_a_frozen_head_comes_here(gpu, monkeypatch, request):
    """When the graph runs, that is; a trained one saves what the graph knew beforehand."""
    if gpu:
        request.getfixturevalue("as_on_a_gpu")
    head = peaked_head(33, 16, 101, ignored=0.2)
    ran = []
    forward = linear_logps_eager.forward
    monkeypatch.setattr(
        linear_logps_eager, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k)
    )

    def both(hidden):
        logps, stats = linear_logps(hidden, head.weight, head.targets, stats=("entropy",))
        return (logps * head.grad).sum(), logps.detach(), stats.entropy

    results = []
    for op in (torch.compile(both, backend="aot_eager", fullgraph=True), both):
        hidden = head.hidden.detach().requires_grad_()
        loss, *rest = op(hidden)
        results.append([*rest, *torch.autograd.grad(loss, hidden)])
    assert len(ran) == 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
