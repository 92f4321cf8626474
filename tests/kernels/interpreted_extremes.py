"""Where 32 bits end and loops go round again: the Triton `linear_logps` in the interpreter.

`test_linear_logps_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1. What
is too large to compute is cut down to one program of a large grid, on memory of which only the
pages that it touches exist.
"""

import dataclasses
import functools
import math
import mmap
from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastdpo_kernels import linear_logps_triton as driver
from fastdpo_kernels import linear_logps_triton_dw as dw
from fastdpo_kernels import linear_logps_triton_exact as exact_kernels
from fastdpo_kernels import linear_logps_triton_gemm as gemm
from fastdpo_kernels import linear_logps_triton_rows as rows
from fastdpo_kernels import tiles
from fastdpo_kernels.impls import STATS
from fastdpo_kernels.linear_logps import linear_logps
from fastdpo_kernels.linear_logps_triton_math import Matrix
from fastdpo_kernels.tiles import Gemm, Variant
from tests.kernels.interpreter import patch_once
from tests.numerics import (
    Head,
    assert_grads_close,
    assert_logps_close,
    assert_stats_close,
    exact,
    far_head,
    peaked_head,
    run,
)

# The interpreter computes both sides of every tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
patch_once()
op = functools.partial(linear_logps, impl="triton")


@pytest.fixture
def flag_all(monkeypatch):
    """Sends every row with a target through the exact kernels."""
    row_sums = driver.row_sums

    def flagged(partial, z, target, logps, share, inverse, lse, flag, any_flag, stats, **kwargs):
        row_sums(partial, z, target, logps, share, inverse, lse, flag, any_flag, stats, **kwargs)
        flag.copy_(target >= 0)
        any_flag.fill_(1)

    def switch() -> None:
        monkeypatch.setattr(driver, "row_sums", flagged)

    return switch


def sparse(*shape: int, dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor:
    """Zeros in memory that nothing reserves; before them lie 2^31 elements more, so that an index
    that wrapped around in 32 bits finds zeros there instead of ending the process."""
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    before = 2**31
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    size = (before + last + 2**16) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, Linux's
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"{size} bytes of addresses: {error}")
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides, before)


def launch(kernel: Any, grid: tuple[int, ...], *args, **constants) -> None:
    kernel[grid](*args, **constants)


FAR = 2**29  # elements between two rows: the last of six begins beyond 2^31


def far(matrix: Tensor) -> Tensor:
    return sparse(*matrix.shape, dtype=matrix.dtype, strides=(FAR, 1)).copy_(matrix)


# ---- indices beyond 2^31


@pytest.mark.parametrize("flagged", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("which", ["hidden", "weight", "adapter", "kept"])
def test_rows_far_apart(which, flagged, flag_all, monkeypatch):
    """To the bits of rows side by side."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16).half(), torch.randn(6, 16).half()
    a, b = torch.randn(3, 16).half(), torch.randn(6, 3).half()
    if which == "kept":  # by the epilogue alone; "hidden" has the GEMM's
        library = Variant(Gemm(32, 64, 32, 4, 2), library=True)
        monkeypatch.setattr(tiles, "default_variant", lambda *_: library)
    if flagged:
        flag_all()

    def results(hidden: Tensor, weight: Tensor, b: Tensor) -> list[Tensor]:
        bias = torch.arange(6.0).half().requires_grad_()
        more: dict = {"lora": (a, b.detach().requires_grad_(), 0.5)} if which == "adapter" else {}
        hidden = hidden.detach().requires_grad_()
        trained = more["lora"][1] if more else weight.detach().requires_grad_()
        weight = weight if more else trained
        logps, stats = op(hidden, weight, torch.arange(6), bias=bias, stats=STATS, **more)
        grads = torch.autograd.grad(logps.sum(), [hidden, trained, bias])
        return [logps, *grads, *(getattr(stats, name) for name in STATS)]

    want = results(hidden, weight, b)
    if which == "kept":
        empty, made = torch.empty, []

        def far_e(*shape, **options):
            if shape != (6, 8):
                return empty(*shape, **options)
            made.append(sparse(*shape, dtype=options["dtype"], strides=(FAR, 1)))
            return made[-1]

        monkeypatch.setattr(torch, "empty", far_e)
    got = results(
        far(hidden) if which == "hidden" else hidden,
        far(weight) if which == "weight" else weight,
        far(b) if which == "adapter" else b,
    )
    assert which != "kept" or len(made) == 1
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_sums_of_tiles_far_apart():
    """Tile x row beyond 2^31, in the epilogue and in the sums of a row."""
    n, n_tiles, block_v = 4, 17, 64
    torch.manual_seed(0)
    product = 3 * torch.randn(n, n_tiles * block_v)
    target = torch.tensor([0, 700, 1087, -1], dtype=torch.int32)
    z = product.gather(1, target.clamp(min=0).long()[:, None])[:, 0]

    def results(n_rows: int) -> list[Tensor]:
        partial = sparse(6, n_tiles, n_rows, dtype=torch.float32)
        v = product.shape[1]
        launch(
            gemm._exp_tile_kernel, (1, n_tiles),
            product, None, z, target, None, None, partial, n_rows, 0, v, 0, n_tiles,
            v, 0, 1.0, 1.0, BLOCK_N=n, BLOCK_V=block_v, SOFTCAP=False, STATS=True,
        )  # fmt: skip
        out = [torch.zeros(n) for _ in range(4)]
        flags = [torch.zeros(n, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)]
        stats = [torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.int8), torch.zeros(n)]
        launch(
            rows._row_sums_kernel, (1,),
            partial, z, target, *out, *flags, *stats, n_rows, n_tiles, v,
            BLOCK_N=n, BLOCK_T=64, STATS=True,
        )  # fmt: skip
        return [*out, *flags, *stats]

    near = results(n)
    want = product.double().log_softmax(1).gather(1, target.clamp(min=0).long()[:, None])[:, 0]
    assert (near[0].double() - want)[:3].abs().max() < 1e-5
    assert all(torch.equal(*pair) for pair in zip(results(2**27), near, strict=True))


def test_gradients_of_rows_too_long_to_count():
    """Row x column of d hidden and dW beyond 2^31, and the parts of E @ W as far apart."""
    n, splits, columns = 8, 2, 16
    torch.manual_seed(0)
    parts, weight, hidden = torch.randn(splits, n, columns), torch.randn(9, 16), torch.randn(n, 16)
    target = torch.arange(n, dtype=torch.int32)
    z, share, inverse = torch.zeros(n), torch.rand(n), torch.rand(n)

    def d_hidden(d: int) -> Tensor:
        product = sparse(splits, n, d, dtype=torch.float32)
        product[:, :, :columns] = parts
        out = sparse(n, d, dtype=torch.float16)
        launch(
            rows._hidden_grad_kernel, (1, 1),
            product, weight, None, target, z, share, inverse, out, n, splits, d,
            *Matrix(weight, None, 1).layout, 1.0, 1.0, BLOCK_N=n, BLOCK_K=columns, SOFTCAP=False,
            FACTORED=False,
        )  # fmt: skip
        return out[:, :columns].clone()

    def d_weight(d: int) -> Tensor:
        out = sparse(9, d, dtype=torch.float16)
        launch(
            dw._target_rows_kernel, (n, 1),
            target, torch.arange(n), share, hidden, out, None, n, d, 16, 1,
            ROUNDED=tl.float32, PARTS=1, BLOCK_R=8, BLOCK_K=columns,
        )  # fmt: skip
        return out[:, :columns].clone()

    for results in (d_hidden, d_weight):
        near = results(columns)
        assert near[:n].any(1).all() and torch.equal(results(FAR), near)


def test_exact_sums_of_splits_far_apart(monkeypatch):
    """Split x row beyond 2^31, in both exact kernels: of the large grid its first programs."""
    n, d, splits, v = 16, 16, 3, 192
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    z = hidden @ weight.T
    target = torch.arange(n, dtype=torch.int32)
    z_y = z.gather(1, target.long()[:, None])[:, 0]
    flags = torch.ones(n, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    builder = type(interpreter.interpreter_builder)
    many = interpreter.TensorHandle(numpy.array([2**30], numpy.int32), tl.int32)
    monkeypatch.setattr(builder, "create_get_num_programs", lambda self, axis: many)
    blocks = exact_kernels.BLOCKS[4] | {"SOFTCAP": False}
    layout = (d, *Matrix(weight, None, 1).layout)

    def results(n_rows: int) -> list[Tensor]:
        scratch = sparse(exact_kernels.FIELDS, splits, n_rows, dtype=torch.float32)
        launch(
            exact_kernels._exact_sums_kernel, (splits,),
            hidden, weight, None, None, target, *flags, scratch, n_rows, splits, v, d, *layout,
            1.0, 1.0, **blocks,
        )  # fmt: skip
        out = [torch.zeros(n) for _ in range(4)]
        stats = [torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.int8), torch.zeros(n)]
        launch(
            exact_kernels._exact_rows_kernel, (1,),
            hidden, weight, None, None, target, z_y, *flags, scratch, *out, None, None, *stats,
            n_rows, splits, v, d, *layout, 0, 1.0, 1.0, 1.0,
            BLOCK_D=64, BLOCK_S=exact_kernels.MOST_SPLITS, STATS=True, FACTORED=False,
            **blocks,
        )  # fmt: skip
        return [*out, *stats]

    near = results(n)
    want = z.double().log_softmax(1).gather(1, target.long()[:, None])[:, 0]
    assert (near[0].double() - want).abs().max() < 1e-5
    assert all(torch.equal(*pair) for pair in zip(results(2**30), near, strict=True))


# ---- loops that go round more than once


@pytest.mark.parametrize("flagged", [False, True], ids=["kept", "exact, recomputed"])
def test_many_tiles(flagged, flag_all):
    """More than the 64 tiles that a row's sums take at a time, more than one block of columns in
    each split of the exact kernels; the frequent tokens last, so that maxima grow on the way."""
    if flagged:
        flag_all()
    near, low = peaked_head(3, 8, 4500), far_head(3, 8, 4500, gap=150.0)
    mixed = Head(
        torch.cat([near.hidden, low.hidden]),
        low.weight.flip(0),
        4499 - torch.cat([torch.tensor([0, 4400]), near.targets[2:], low.targets]),
        None,
        torch.cat([near.grad, low.grad]),
    )
    assert torch.equal(near.weight, low.weight) and -(-4500 // 64) > 64
    got = run(op, mixed, workspace_bytes=120_000 if flagged else 2**20)
    assert (exact(mixed).logps < -100)[3:].all()
    assert_logps_close(mixed, got.logps)
    assert_grads_close(mixed, got)
    assert_stats_close(mixed, got.stats)


def test_the_first_of_equal_logits_is_the_top_one():
    """In a tile, in two tiles, and in two rounds of the 64 tiles that are summed at a time."""
    ties = ((3, 7), (5, 70), (9, 64 * 65))
    torch.manual_seed(0)
    weight, hidden = torch.randn(64 * 66, 16), torch.zeros(6, 16)
    for which, tied in enumerate(ties):
        weight[:, which] = 0
        weight[list(tied), which] = 1
        hidden[2 * which : 2 * which + 2, which] = 9
    with torch.no_grad():
        _, stats = op(hidden, weight, torch.tensor(ties).flatten(), stats=("is_top1",))
    assert stats.is_top1 is not None and stats.is_top1.tolist() == 3 * [True, False]


def test_rounds_of_tiles_add_no_error():
    """Each round of 64 tiles adds less than half an ulp of the first: without their rounding
    errors beside it the sum would stay where it is, 160 ulps below."""
    rounds, ulp = 400, 2.0**-23
    least = 2.0 ** -(58 + 10)  # log p = -log1p(s 2^58) = -s 2^58, nearly
    partial = torch.zeros(1, 64 * rounds, 1)
    partial[0, ::64, 0] = 0.4 * ulp * least
    partial[0, 0, 0] = least
    logp, share, inverse, lse, z = (torch.zeros(1) for _ in range(5))
    target, flag, any_flag = (torch.zeros(1, dtype=torch.int32) for _ in range(3))
    rows.row_sums(partial, z, target, logp, share, inverse, lse, flag, any_flag, None, v=9)
    s = partial.double().sum() * 2.0**58
    # a product, a logarithm and a quotient, each rounded
    for got, want in ((logp, -s.log1p()), (share, s / (1 + s))):
        assert ((got.double() - want) / want).abs() < 4 * ulp


def test_small_gradients_in_fp16():
    """Those of sure tokens: as close as E in bf16 and fp16's own subnormals allow."""
    torch.manual_seed(0)
    weight = (torch.randn(40, 32) / 8).half()
    targets = torch.arange(8)
    lift = torch.linspace(12, 18, 8)
    direction = weight[targets].float() / weight[targets].float().square().sum(1, keepdim=True)
    head = Head((lift[:, None] * direction).half(), weight, targets, None, torch.ones(8))
    got, want = run(op, head, stats=()).d_hidden.double(), exact(head).d_hidden
    assert (want.abs().amax(1) < 5e-5).sum() > 2  # rows that this is about
    # E, W and H in bf16, of 2 (1 - p) in all; the result rounded twice, and to subnormals
    allowed = 6 * 2.0**-8 * -exact(head).logps.expm1()[:, None] * weight.double().abs().max()
    allowed = allowed + 2.0**-10 * want.abs() + 2.0**-24
    assert ((got - want).abs() <= allowed).all()


# ---- operands that a kernel cannot take


def test_bf16_is_refused_where_it_would_be_multiplied_as_integers():
    head = peaked_head(4, 8, 20, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="linear_logps: .* bfloat16 .* float16 or float32"):
        op(head.hidden, head.weight, head.targets)


def test_rows_that_overlap_leave_the_descriptors(monkeypatch):
    """One row for all, and windows on one sequence: to the bits of their copies."""
    described = Gemm(32, 64, 32, 4, 2, loads="persistent")
    monkeypatch.setitem(tiles.TABLES["interpreter"], "half", (described, Gemm(32, 64, 32, 4, 2)))
    taken, default = [], tiles.default_variant

    def spy(problem, device) -> Variant:
        taken.append(default(problem, device))
        return taken[-1]

    monkeypatch.setattr(tiles, "default_variant", spy)
    head = peaked_head(6, 32, 20, dtype=torch.float16)
    assert gemm.describable(head.hidden, head.weight)
    run(op, head, stats=())
    assert taken[0].gemm == described
    one = head.hidden[:1].expand(6, 32)
    windows = torch.randn(200).half().as_strided((20, 32), (8, 1))
    for views in ({"hidden": one}, {"weight": windows}):
        assert not gemm.describable(*views.values())
        taken.clear()
        got = run(op, dataclasses.replace(head, **views), stats=())
        assert {variant.gemm.loads for variant in taken} == {"pointer"}
        copies = {name: view.contiguous() for name, view in views.items()}
        want = run(op, dataclasses.replace(head, **copies), stats=())
        assert torch.equal(got.logps, want.logps) and torch.equal(got.d_hidden, want.d_hidden)


# ---- logits that are not finite


@pytest.mark.parametrize("workspace", [2**20, 14_000], ids=["kept", "recomputed"])
def test_a_target_that_is_masked(workspace):
    """A bias of -inf takes columns out of the vocabulary, a target among them: its log-prob is
    -inf, and gradients and statistics are still those of the smaller vocabulary."""
    head = peaked_head(20, 8, 101)
    targets = head.targets.clone()
    targets[:9] = 55
    bias = torch.zeros(101)
    bias[50:60] = -torch.inf
    masked = Head(head.hidden, head.weight, targets, bias, head.grad)
    got, want = run(op, masked, stats=STATS, workspace_bytes=workspace), exact(masked)
    assert got.logps.isneginf().equal(targets == 55)
    rest = targets != 55
    assert (got.logps.double() - want.logps)[rest].abs().max() < 1e-5
    # logits of some 20 nat err by an ulp, 2e-6, and gradients by that times 2 |g| max |W| < 10
    for name in ("d_hidden", "d_weight", "d_bias"):
        assert (getattr(got, name).double() - getattr(want, name)).abs().max() < 2e-5, name
    for name in ("entropy", "log_sum_sq_probs"):  # sums of p log p and p^2: 20 nat of such logits
        found, true = getattr(got.stats, name), getattr(want.stats, name)
        assert (found.double() - true).abs().max() < 20 * 2e-6, name
    assert got.stats.is_top1 is not None and not got.stats.is_top1[:9].any()
