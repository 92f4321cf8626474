"""The Triton kernels of `linear_logps`, run by Triton's interpreter on a CPU.

`test_linear_logps_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1. The
interpreter multiplies bf16 operands of `tl.dot` as raw integers, so operands here are fp32 and
fp16; bf16 comes in where a library GEMM does the products. Tiles are 32 x 64 x 32.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from fastdpo_kernels import linear_logps_triton as driver
from fastdpo_kernels import linear_logps_triton_job as jobs
from fastdpo_kernels import linear_logps_triton_products as products
from fastdpo_kernels import tiles
from fastdpo_kernels.linear_logps import linear_logps
from fastdpo_kernels.linear_logps_triton_gemm import describable
from fastdpo_kernels.tiles import Gemm, Variant
from tests.kernels.interpreter import patch_once
from tests.numerics import (
    Head,
    assert_adapter_close,
    assert_each_gradient_alone,
    assert_grads_close,
    assert_logps_close,
    assert_stats_close,
    exact,
    far_head,
    flat_head,
    negative_head,
    peaked_head,
    run,
    sure_head,
)

# The interpreter computes both sides of every tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
patch_once()
op = functools.partial(linear_logps, impl="triton")

# Half an ulp of bf16, for each operand of a gradient's GEMM that is rounded to it: E always, and
# of fp16 inputs W or H; where E is kept H also carries the row's factor, one rounding more.
BF16 = 2.0**-8
E_ULP = {torch.float32: 0.0, torch.float16: 3 * BF16, torch.bfloat16: 2 * BF16}
TILE = Gemm(32, 64, 32, 4, 2)
VARIANTS = {
    "pointer": Variant(TILE),
    "descriptor": Variant(Gemm(32, 64, 32, 4, 2, loads="descriptor")),
    "persistent": Variant(Gemm(32, 64, 32, 4, 2, loads="persistent")),
    "library": Variant(TILE, library=True),
    "whole": Variant(TILE, split=False),
}
FULL = {"softcap": 7.0, "scale": 1.2, "temperature": 0.8}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that whatever is not written shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.is_floating_point():
            return out.fill_(torch.nan)
        return out.fill_(255 if out.dtype == torch.uint8 else 77)  # bytes of 255 are NaN

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def use(monkeypatch):
    """Sets the variant that the driver takes."""

    def set_variant(variant: Variant) -> None:
        monkeypatch.setattr(tiles, "default_variant", lambda problem, device: variant)

    return set_variant


@pytest.fixture
def counts(monkeypatch) -> Iterator[Counter]:
    """What the driver launches: kernels by launcher, library GEMMs as "multiply"; and "cells", the
    rows x columns of the vocabulary that the GEMMs over N x V x D went through."""
    counter: Counter = Counter()
    names = (
        "exp_gemm exp_tile multiply multiply_splits target_logits row_sums hidden_grad exact_rows "
        "dw_operand add_target_rows column_sums"
    ).split()

    def counted(name, launcher):
        def launch(*args, **kwargs):
            counter[name] += 1
            if name == "exp_gemm":
                counter["cells"] += len(args[0]) * len(args[1])
            elif name == "multiply":  # E, or E transposed, is its first operand
                counter["cells"] += args[1].numel()
            return launcher(*args, **kwargs)

        return launch

    for name, module in itertools.product(names, (driver, jobs, products)):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    yield counter


def check(head: Head, stats=(), **options) -> None:
    """Everything within the budgets of tests/numerics.py, and twice the same."""
    transform = {k: v for k, v in options.items() if k != "workspace_bytes"}
    first, second = (run(op, head, stats=stats, **options) for _ in range(2))
    if len(head.hidden) == 0:
        assert first.logps.shape == (0,) and not first.d_weight.any()
        return
    assert_logps_close(head, first.logps, **transform)
    e_ulp = E_ULP[head.hidden.dtype]
    assert_grads_close(head, first, e_ulp=e_ulp, **transform)
    if stats:
        assert_stats_close(head, first.stats, **transform)
    for name in ("logps", "d_hidden", "d_weight", "d_bias"):
        one, other = getattr(first, name), getattr(second, name)
        assert one is None or torch.equal(one, other), f"{name} differs between two runs"


ALL_STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transform", [{}, FULL], ids=["plain", "full"])
def test_gradients_and_statistics(dtype, transform):
    head = peaked_head(70, 40, 200, dtype=dtype, bias=bool(transform), ignored=0.1)
    check(head, ALL_STATS, **transform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_subsets_of_gradients(use, dtype):
    if dtype == torch.bfloat16:
        use(VARIANTS["library"])
    head = peaked_head(33, 16, 100, dtype=dtype, bias=True, ignored=0.1)
    subsets = [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")]
    assert_each_gradient_alone(op, head, subsets, e_ulp=E_ULP[dtype])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(use, name):
    use(VARIANTS[name])
    head = peaked_head(45, 64, 330, dtype=torch.float16, bias=True, ignored=0.1)
    check(head, **FULL)


@pytest.mark.parametrize("name", ["library", "whole"])
def test_variants_in_fp32(use, name):
    use(VARIANTS[name])
    check(peaked_head(45, 24, 330, bias=True), ALL_STATS, **FULL)


def test_bf16_by_the_library(use):
    use(VARIANTS["library"])
    check(peaked_head(40, 24, 200, dtype=torch.bfloat16, ignored=0.1), softcap=5.0)


@pytest.mark.parametrize("make", [flat_head, functools.partial(negative_head, level=300.0)])
def test_flat_and_very_negative_logits(make):
    check(make(33, 32, 129), ALL_STATS)


@pytest.mark.parametrize("gap", [60.0, 98.0, 101.0, 150.0])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_rows_far_below_the_largest_logit(gap, kept):
    far = far_head(20, 32, 150, gap=gap)
    near = peaked_head(20, 32, 150)
    mixed = Head(
        torch.cat([near.hidden[:9], far.hidden, near.hidden[9:]]),
        far.weight,
        torch.cat([near.targets[:9], far.targets, near.targets[9:]]),
        None,
        torch.cat([near.grad[:9], far.grad, near.grad[9:]]),
    )
    assert (exact(mixed).logps.min() < -99.8) == (gap > 100)
    check(mixed, ALL_STATS, workspace_bytes=2**20 if kept else 24_000)


def test_rows_far_below_with_everything_on():
    head = far_head(18, 32, 100, gap=130.0, dtype=torch.float16)
    check(head, ALL_STATS, softcap=200.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("workspace", [2**20, 60_000], ids=["kept", "recomputed"])
def test_an_adapter(dtype, workspace):
    assert_adapter_close(
        op, 45, 24, 200, 5, dtype=dtype, bias=True, ignored=0.1, e_ulp=E_ULP[dtype],
        stats=ALL_STATS, workspace_bytes=workspace, **FULL,
    )  # fmt: skip


def test_an_adapter_in_bf16(use):
    use(VARIANTS["library"])
    assert_adapter_close(
        op, 33, 24, 130, 5, dtype=torch.bfloat16, ignored=0.1, e_ulp=E_ULP[torch.bfloat16]
    )


def test_an_adapter_through_descriptors(use):
    use(VARIANTS["persistent"])
    assert_adapter_close(
        op, 33, 24, 130, 8, dtype=torch.float16, stats=(), e_ulp=E_ULP[torch.float16]
    )


@pytest.fixture
def flag_all(monkeypatch):
    """Sends every row with a target through the exact kernels."""
    rows = driver.row_sums

    def flagged(partial, z, target, logps, share, inverse, lse, flag, any_flag, stats, **kwargs):
        rows(partial, z, target, logps, share, inverse, lse, flag, any_flag, stats, **kwargs)
        flag.copy_(target >= 0)
        any_flag.fill_(1)

    monkeypatch.setattr(driver, "row_sums", flagged)


def test_the_exact_kernels_are_right_for_any_row(flag_all):
    check(peaked_head(37, 24, 150, bias=True, ignored=0.1), ALL_STATS, **FULL)


@pytest.mark.parametrize("exact_kernels", [False, True], ids=["", "flagged"])
def test_fp16_gradients_of_likely_tokens(exact_kernels, request):
    """Under a GradScaler's loss scale: see test_linear_logps_fp16.py."""
    if exact_kernels:
        request.getfixturevalue("flag_all")
    head = sure_head(24, 32, 150, scale=1 / 16)
    head.targets[5] = -100
    check(head, scale=1 / 16)
    # 1 - p_y underflows to 0: no gradient, and no division by it
    weight = torch.eye(8, 16, dtype=torch.float16)
    certain = Head(1000 * weight[:4], weight, torch.arange(4), None, torch.full((4,), 2.0**16))
    outcome = run(op, certain, stats=())
    assert not outcome.logps.any() and not outcome.d_hidden.any()


def test_the_exact_kernels_with_an_adapter(flag_all):
    assert_adapter_close(op, 20, 24, 150, 6, stats=ALL_STATS, ignored=0.1, softcap=9.0)


@pytest.mark.parametrize("n", [0, 1, 31, 33])
@pytest.mark.parametrize(("d", "v"), [(17, 63), (1, 65), (33, 1)])
def test_odd_sizes(n, d, v):
    check(peaked_head(n, d, v, bias=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_inputs(dtype):
    head = peaked_head(40, 64, 100, dtype=dtype)
    d = 32
    views = Head(
        head.hidden[::2, ::2],
        head.weight.T.contiguous().T[:, :d],
        head.targets[::2],
        torch.randn(200).to(dtype)[::2],
        head.grad[::2],
    )
    check(views)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_columns_far_apart(which, flag_all):
    """Columns 2^29 elements apart: the last of them begins beyond 2^31."""
    head = peaked_head(6, 6, 20, dtype=torch.float16)
    near = getattr(head, which)
    stride = 2**29
    room = torch.from_numpy(numpy.zeros(5 * stride + len(near), numpy.float16))  # never touched
    far = room.as_strided(near.shape, (1, stride))
    far.copy_(near)
    other = dataclasses.replace(head, **{which: far})
    one, two = run(op, head, stats=()), run(op, other, stats=())
    assert torch.equal(one.logps, two.logps) and torch.equal(one.d_hidden, two.d_hidden)
    assert torch.equal(one.d_weight, two.d_weight)


def test_misaligned_rows_leave_the_descriptors(use, monkeypatch):
    monkeypatch.setitem(tiles.TABLES["interpreter"], "half", (VARIANTS["persistent"].gemm, TILE))
    head = peaked_head(20, 33, 100, dtype=torch.float16)
    odd = Head(head.hidden[:, 1:], head.weight[:, 1:], head.targets, None, head.grad)
    assert not describable(odd.hidden)
    check(odd)


def test_weights_of_another_dtype():
    for hidden, weight in itertools.permutations((torch.float32, torch.float16), 2):
        head = peaked_head(30, 32, 150, dtype=hidden, weight_dtype=weight)
        check(head)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("transform", [{}, FULL], ids=["plain", "full"])
def test_ignored_rows_may_hold_anything(value, transform):
    head = peaked_head(40, 16, 100, bias=bool(transform), ignored=0.3)
    head.hidden[head.targets == -100] = value
    for workspace in (2**20, 20_000):
        check(head, ALL_STATS, workspace_bytes=workspace, **transform)
    nothing = Head(head.hidden, head.weight, torch.full_like(head.targets, -100), None, head.grad)
    out = run(op, nothing, stats=())
    assert not out.logps.any() and not out.d_hidden.any() and not out.d_weight.any()


def test_a_masked_vocabulary():
    """A bias of -inf takes a token out of the vocabulary."""
    head = peaked_head(20, 16, 100, bias=True)
    out = torch.zeros(100, dtype=torch.bool)
    out[torch.tensor([3, 64, 99])] = True
    out[head.targets] = False
    assert head.bias is not None
    masked = Head(
        head.hidden, head.weight, head.targets, head.bias.masked_fill(out, -torch.inf), head.grad
    )
    got, want = run(op, masked, stats=ALL_STATS), exact(masked)
    # an infinite logit has no budget: logits of some 20 nat err by an ulp, 2e-6, and gradients by
    # that times 2 |g| max |W| < 10
    assert (got.logps.double() - want.logps).abs().max() < 1e-5
    assert (got.d_hidden.double() - want.d_hidden).abs().max() < 2e-5
    assert got.stats.entropy is not None
    assert torch.isfinite(got.stats.entropy).all() and torch.isfinite(got.d_weight).all()


def test_every_kernel_runs_here(use, monkeypatch):
    """A kernel that is added and not interpreted shows."""
    ran: set[str] = set()
    call = interpreter.GridExecutor.__call__

    def spy(self, *args, **kwargs):
        ran.add(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", spy)
    for name in ("pointer", "persistent", "library"):
        use(VARIANTS[name])
        run(op, peaked_head(20, 16, 70, dtype=torch.float16, bias=True), stats=())
    files = Path(driver.__file__).parent.glob("linear_logps_triton*.py")
    source = "".join(file.read_text() for file in files)
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", source, re.M))
    assert ran == kernels and len(kernels) == 11


# ---- counts: GEMMs, launches, bytes


def test_one_gemm_without_gradient(counts):
    head = peaked_head(40, 32, 200)
    with torch.no_grad():
        op(head.hidden, head.weight, head.targets)
    cells = counts.pop("cells")
    assert cells == 1 * 40 * 200
    assert counts == {"target_logits": 1, "exp_gemm": 1, "row_sums": 1, "exact_rows": 1}


def test_two_gemms_for_a_frozen_head(use, counts):
    use(VARIANTS["whole"])
    head = peaked_head(40, 32, 200)
    hidden = head.hidden.requires_grad_()
    op(hidden, head.weight, head.targets).sum().backward()
    cells = counts.pop("cells")
    assert cells == 2 * 40 * 200
    expected = "target_logits exp_gemm multiply_splits multiply row_sums hidden_grad exact_rows"
    assert counts == dict.fromkeys(expected.split(), 1)


@pytest.mark.parametrize(("workspace", "expected"), [(2**20, 3), (40_000, 4)])
def test_gemms_for_a_trained_head(use, counts, workspace, expected):
    """Three where E is kept, four where it is computed again."""
    use(VARIANTS["whole"])
    run(op, peaked_head(40, 32, 200), stats=(), workspace_bytes=workspace)
    assert counts["cells"] == expected * 40 * 200
    assert counts["add_target_rows"] == 1


def test_a_trained_head_under_frozen_states(counts):
    """Only the gradients asked for: E is kept, E @ W is not computed."""
    head = peaked_head(40, 32, 200)
    weight = head.weight.requires_grad_()
    op(head.hidden, weight, head.targets).sum().backward()
    assert counts["cells"] == 2 * 40 * 200
    assert counts["multiply_splits"] == counts["hidden_grad"] == 0


@pytest.mark.parametrize("workspace", [24_000, 60_000, 2**22])
def test_log_probs_do_not_depend_on_the_chunks(workspace, counts):
    head = peaked_head(100, 32, 500)
    with torch.no_grad():
        whole = op(head.hidden, head.weight, head.targets)
    hidden = head.hidden.clone().requires_grad_()
    chunked = op(hidden, head.weight, head.targets, workspace_bytes=workspace)
    assert torch.equal(chunked, whole)
    assert (counts["exp_gemm"] > 2) == (workspace < 2**20)


def test_memory_stays_within_the_workspace(monkeypatch):
    """Everything allocated, results aside, by driver and library."""
    n, d, v = 96, 32, 640
    head = peaked_head(n, d, v)
    for workspace in (40_000, 120_000, 2**20):
        sizes = []
        empty = torch.empty

        def spy(*args, _sizes=sizes, _empty=empty, **kwargs):
            out = _empty(*args, **kwargs)
            _sizes.append(out.numel() * out.element_size())
            return out

        monkeypatch.setattr(torch, "empty", spy)
        run(op, head, stats=(), workspace_bytes=workspace)
        monkeypatch.setattr(torch, "empty", empty)
        results = n * d * 4 + v * d * 4 + 4 * n
        forward_and_backward = sum(sizes) - results
        assert forward_and_backward <= 2 * workspace


def test_a_workspace_too_small_is_refused():
    head = peaked_head(40, 32, 200)
    with pytest.raises(ValueError, match=r"workspace_bytes=2000 .* take \d+ bytes"):
        op(head.hidden, head.weight, head.targets, workspace_bytes=2000)


def test_a_workspace_that_the_forward_pass_takes_is_enough_for_dw():
    head = peaked_head(8, 200, 100)
    weight = head.weight.requires_grad_()
    refused = 0
    for workspace in range(2_000, 300_000, 4_000):
        try:
            logps = op(head.hidden.detach(), weight, head.targets, workspace_bytes=workspace)
        except ValueError:
            refused += 1
            continue
        (grad,) = torch.autograd.grad(logps.sum(), [weight])
        assert grad.isfinite().all() and refused
        return
    raise AssertionError("no workspace was enough")


def test_library_flags_are_left_as_they_were():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with pytest.raises(ZeroDivisionError), driver.whole_sums():
        assert not matmul.allow_bf16_reduced_precision_reduction
        _ = 1 / 0
    assert before == matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("workspace", [2**20, 60_000], ids=["kept", "recomputed"])
def test_autocast_rounds_part_by_part(workspace, monkeypatch):
    """To the bits of hidden states rounded beforehand, which never exist as a whole."""
    head = peaked_head(45, 24, 330, bias=True, ignored=0.1)
    seen, forward = [], driver.run_forward

    def spy(job, *args):
        seen.append((job, jobs.problem_of(job, "hidden", 2**20).row_copy))
        return forward(job, *args)

    monkeypatch.setattr(driver, "run_forward", spy)
    with torch.autocast("cpu", torch.float16):
        under = run(op, head, stats=(), workspace_bytes=workspace, **FULL)
    ((job, row_copy),) = seen
    assert job.hidden.dtype == torch.float32 and job.hidden.data_ptr() == head.hidden.data_ptr()
    assert job.rounded == torch.float16 and row_copy == 2 * 24
    half = dataclasses.replace(head, hidden=head.hidden.half())
    want = run(op, half, stats=(), workspace_bytes=workspace, **FULL)
    assert torch.equal(under.logps, want.logps) and torch.equal(under.d_weight, want.d_weight)
    assert torch.equal(under.d_hidden.half(), want.d_hidden)
    assert under.d_hidden.dtype == torch.float32


@pytest.mark.soak
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(0, 90),
    d=st.integers(1, 70),
    v=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3]),
    full=st.booleans(),
    workspace=st.sampled_from([60_000, 2**20]),
    name=st.sampled_from(["pointer", "library", "whole"]),
    seed=st.integers(0, 99),
)
def test_random_shapes(use, n, d, v, dtype, bias, ignored, full, workspace, name, seed):
    use(VARIANTS[name])
    head = peaked_head(n, d, v, dtype=dtype, bias=bias, ignored=ignored, seed=seed)
    check(head, ALL_STATS, workspace_bytes=workspace, **(FULL if full else {}))
