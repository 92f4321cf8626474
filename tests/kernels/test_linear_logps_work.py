"""What `linear_logps` computes, keeps and allocates, in torch: gradients, GEMMs, bytes, bits.

How exact its numbers are is tested in test_linear_logps.py.
"""

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdpo_kernels import (
    linear_logps,
    linear_logps_call,
    linear_logps_torch,
    linear_logps_torch_tiles,
)
from fastdpo_kernels.impls import STATS
from fastdpo_kernels.reference import linear_logps_reference
from tests import numerics
from tests.kernels.linear_logps_cases import (
    SMALL,
    TRANSFORMS,
    CountMatmuls,
    peak_bytes,
    saved_kept,
)
from tests.numerics import Head, far_head, peaked_head, run


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Heads here are tiny, but not for that: the way of large ones is tested."""
    monkeypatch.setattr(linear_logps_call, "is_tiny", lambda *args, **kwargs: False)


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


def test_weight_gradient_by_kept_exponentials_and_by_recomputing_agree():
    head = peaked_head(200, 64, 2049, ignored=0.1)
    assert saved_kept(head, 256 * 2**20) and not saved_kept(head, SMALL)
    kept = run(linear_logps, head)
    again = run(linear_logps, head, workspace_bytes=SMALL)
    for outcome in (kept, again):
        numerics.assert_grads_close(head, outcome)


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
    made = [(dw is not None, db is not None) for dw, db in grads]
    assert made == {"hidden": [], "weight": [(True, False)], "bias": [(False, True)]}[wanted]
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


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "frozen"])
@pytest.mark.parametrize("impl", ["auto", "torch"])  # all at once, in tiles
def test_masked_vocabulary_through_an_infinite_bias(impl, grads):
    """A bias of -inf takes a column out: the log-probs are those of the smaller vocabulary."""
    head = peaked_head(40, 16, 101)
    head.hidden.requires_grad_(grads)
    op = functools.partial(linear_logps, stats=("entropy",), impl=impl)
    keep = torch.ones(101, dtype=torch.bool)
    keep[50:60] = False
    targets = head.targets.clamp(max=49)
    bias = torch.zeros(101).masked_fill(~keep, -math.inf)
    got, stats = op(head.hidden, head.weight, targets, bias=bias)
    smaller = Head(head.hidden.detach(), head.weight[keep], targets, None, head.grad)
    numerics.assert_logps_close(smaller, got.detach())
    entropy = numerics.exact(smaller).stats.entropy
    assert entropy is not None and stats.entropy is not None
    # p log p with logits of some 20 nat, each an ulp (2e-6) off after 16 products
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=20 * 2e-6)
    close(stats.entropy.double(), entropy)
    never = torch.full_like(targets, 55)
    got, stats = op(head.hidden, head.weight, never, bias=bias)
    assert got.isneginf().all() and stats.entropy is not None
    close(stats.entropy.double(), entropy)


def test_the_entropy_of_rows_with_large_terms():
    """The entropy comes from sum E h W^T, of terms of 2e4 where E reaches e^64 and more."""
    n, d, v = 8, 64, 5000
    rng = torch.Generator().manual_seed(0)
    hidden = 0.1 * torch.randn(n, d, generator=rng)
    weight = 0.1 * torch.randn(v, d, generator=rng)
    hidden[:, 0] = weight[:, 0] = 2e4**0.5
    hidden[:, 1] = 10
    for spread in (5.0, 6.2, 7.5):  # the target's logp is about -10 spread
        weight[:, 1] = -torch.linspace(0, spread, v)
        head = Head(hidden, weight, torch.full((n,), v - 1), None, torch.ones(n))
        _, stats = linear_logps(
            hidden.clone().requires_grad_(), weight, head.targets, impl="torch", stats=("entropy",)
        )
        want = numerics.exact(head).stats.entropy
        assert stats.entropy is not None and want is not None
        # p log p of logits that are 64 roundings of 2e4 off at worst, 2e4 * 2^-24 each
        torch.testing.assert_close(stats.entropy.double(), want, rtol=0, atol=64 * 2e4 * 2.0**-24)


def test_squares_where_the_first_tiles_are_masked():
    head = peaked_head(40, 16, 3000)
    bias = torch.zeros(3000).index_fill(0, torch.arange(2100), -math.inf)
    targets = head.targets.clamp(min=2100)
    stats = linear_logps(
        head.hidden, head.weight, targets, bias=bias, impl="torch", stats=("log_sum_sq_probs",)
    )[1]
    smaller = Head(head.hidden, head.weight[2100:], targets - 2100, None, head.grad)
    want = numerics.exact(smaller).stats.log_sum_sq_probs
    assert stats.log_sum_sq_probs is not None and want is not None
    torch.testing.assert_close(stats.log_sum_sq_probs.double(), want, rtol=0, atol=40e-6)


def test_strided_inputs():
    head = peaked_head(33, 24, 257)
    hidden = torch.stack([head.hidden, head.hidden], 2)[:, :, 1]  # stride 2 within a row
    weight = head.weight.T.contiguous().T  # column-major
    targets = torch.stack([head.targets, head.targets], 1)[:, 0]
    strided = Head(hidden, weight, targets, None, head.grad)
    got = run(linear_logps, strided)
    assert not (hidden.is_contiguous() or weight.is_contiguous() or targets.is_contiguous())
    numerics.assert_logps_close(strided, got.logps)
    numerics.assert_grads_close(strided, got)
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
    # fp64: sums of 30 rows, each right to some 1e-15, and cancelling little
    torch.testing.assert_close(gradient(linear_logps), want, rtol=1e-12, atol=1e-13)


def test_gradients_scale_exactly_with_a_loss_scale():
    head = peaked_head(30, 16, 101, dtype=torch.float16, weight_dtype=torch.float32)
    small, large = (
        run(linear_logps, Head(head.hidden, head.weight, head.targets, None, head.grad * 2.0**k))
        for k in (-8, 2)
    )
    assert torch.equal(large.d_weight, small.d_weight * 2.0**10)
    # fp16 rounds what is below its range to a multiple of 2^-24; the rest scales to the same bits.
    normal = small.d_hidden.abs() >= torch.finfo(torch.float16).tiny
    assert 0.2 < normal.double().mean() < 1 and torch.isfinite(large.d_hidden).all()
    assert torch.equal(large.d_hidden[normal], (small.d_hidden * 2.0**10)[normal])
    rest = large.d_hidden.double() * 2.0**-10 - small.d_hidden.double()
    assert rest[~normal].abs().max() <= 2.0**-25 + 2.0**-35


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


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("cols", [1, 2, 4])
def test_top1_counts_the_first_of_equal_logits(cols, impl, monkeypatch):
    monkeypatch.setattr(linear_logps_torch_tiles, "COLS", cols)
    weight = torch.tensor([[0.0], [1.0], [1.0], [-1.0]])
    hidden = torch.ones(4, 1)
    _, stats = linear_logps(hidden, weight, torch.arange(4), stats=("is_top1",), impl=impl)
    assert stats.is_top1 is not None and stats.is_top1.tolist() == [False, True, False, False]


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
    # hidden's gradient unscaled and returned; the weight's; two dozen [N] vectors
    results = n * d * 2 * size + (v * d * size if trained else 0) + 24 * 8 * n
    assert peak_bytes(step) <= workspace_bytes + results
    assert workspace_bytes + results < n * v * 4  # less than one [N, V] of logits


def test_a_bias_takes_no_further_tile():
    n, d, v, workspace_bytes = 2048, 16, 700, 2 * 2**20
    head = peaked_head(n, d, v, bias=True)

    def step():
        op = functools.partial(linear_logps, impl="torch", workspace_bytes=workspace_bytes)
        op(head.hidden, head.weight, head.targets, bias=head.bias)

    assert peak_bytes(step) <= workspace_bytes + 24 * 8 * n


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_vector_of_all_rows_beside_the_results(trained):
    """At any N: a single vector [N] in fp32 would be more than this workspace."""
    n, d, v, workspace_bytes = 300_000, 4, 9, 2**20
    head = peaked_head(n, d, v, bias=True, ignored=0.1)
    head.hidden.requires_grad_()
    head.weight.requires_grad_(trained)

    def step():
        logps, _ = linear_logps(
            head.hidden, head.weight, head.targets, bias=head.bias, softcap=20.0,
            stats=("entropy",), workspace_bytes=workspace_bytes,
        )  # fmt: skip
        logps.backward(head.grad)

    # log-probs, the entropy, hidden's gradient unscaled and returned, the weight's; of a trained
    # head what each row keeps for the backward pass: its frame, 1 / (s_o + s_y), E at the target
    results = 4 * (2 * n + 2 * n * d + v * d + 3 * n * trained)
    assert peak_bytes(step) <= workspace_bytes + results
    exact = linear_logps(head.hidden, head.weight, head.targets, bias=head.bias, softcap=20.0)
    part = linear_logps(
        head.hidden[-999:], head.weight, head.targets[-999:], bias=head.bias, softcap=20.0
    )
    assert torch.equal(exact[-999:], part)


def test_the_backward_pass_makes_no_wider_copy_of_the_gradient():
    n, d, v, workspace_bytes = 8192, 256, 200, 2**21
    head = peaked_head(n, d, v, dtype=torch.bfloat16)
    head.hidden.requires_grad_()

    def step():
        logps = linear_logps(
            head.hidden, head.weight, head.targets, workspace_bytes=workspace_bytes
        )
        logps.sum().backward()

    # the gradient unscaled and returned, and [N] vectors; it would take n d 4 more
    assert peak_bytes(step) <= workspace_bytes + 2 * n * d * 2 + 24 * 8 * n


def test_autocast_makes_no_copy_of_all_hidden_rows():
    n, d, v, workspace_bytes = 8192, 256, 200, 2**20
    head = peaked_head(n, d, v)
    head.hidden.requires_grad_()

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            linear_logps(head.hidden, head.weight, head.targets, workspace_bytes=workspace_bytes)

    # the unscaled gradient in bf16, and [N] vectors; a copy would be n d 2 more, four times the
    # workspace
    assert peak_bytes(forward) <= workspace_bytes + n * d * 2 + 24 * 8 * n


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
