"""A small workspace, and so many blocks of rows: the Triton `linear_logps` in the interpreter.

`test_linear_logps_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import functools
from typing import Any

import pytest
import torch

from fastdpo_kernels import linear_logps_triton as driver
from fastdpo_kernels import tiles
from fastdpo_kernels.impls import STATS
from fastdpo_kernels.linear_logps import linear_logps
from fastdpo_kernels.tiles import Gemm, Plan, Variant
from tests.kernels.interpreter import patch_once
from tests.kernels.linear_logps_cases import Sizes
from tests.numerics import (
    assert_adapter_close,
    assert_grads_close,
    assert_logps_close,
    assert_stats_close,
    peaked_head,
    run,
)

# The interpreter computes both sides of every tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
patch_once()
op = functools.partial(linear_logps, impl="triton")
FULL = {"softcap": 7.0, "scale": 1.2, "temperature": 0.8}
# Few bytes for each of these rows: what dW needs of a row exists for some at a time.
N, WORKSPACE = 100, 12_000
# Half an ulp of bf16 for E, and for W or H: fp16 meets E in bf16.
E_ULP = {torch.float32: 0.0, torch.float16: 3 * 2.0**-8}


def in_blocks(plans: list[Plan]) -> None:
    *_, forward, backward = plans
    assert forward.rows <= N // 3 and forward.beside == 0
    assert backward.rows <= backward.block <= N // 3
    assert all(plan.bytes + plan.beside <= WORKSPACE for plan in plans)


@pytest.mark.parametrize(
    ("dtype", "transform"), [(torch.float32, {}), (torch.float16, FULL)], ids=["plain", "full"]
)
def test_a_trained_head(dtype, transform, plans):
    head = peaked_head(N, 8, 40, dtype=dtype, bias=bool(transform), ignored=0.1)
    got = run(op, head, stats=STATS, workspace_bytes=WORKSPACE, **transform)
    in_blocks(plans)
    assert_logps_close(head, got.logps, **transform)
    assert_grads_close(head, got, e_ulp=E_ULP[dtype], **transform)
    assert_stats_close(head, got.stats, **transform)
    whole = run(op, head, stats=STATS, **transform)
    assert torch.equal(got.logps, whole.logps)
    for name in STATS:
        assert torch.equal(getattr(got.stats, name), getattr(whole.stats, name)), name


def test_weights_in_16_bits_are_rounded_once(plans):
    """The target rows of every block meet dW's fp32 sums: one target in all rows, and its row of
    dW is as exact as with all rows at once."""
    head = peaked_head(N, 8, 40, dtype=torch.float16)
    head.targets.fill_(3)
    got = run(op, head, stats=(), workspace_bytes=WORKSPACE)
    in_blocks(plans)
    assert_grads_close(head, got, e_ulp=E_ULP[torch.float16])


def test_an_adapter_on_the_head(plans):
    assert_adapter_close(
        op, N, 8, 40, 4, dtype=torch.float16, bias=True, ignored=0.1, e_ulp=E_ULP[torch.float16],
        stats=STATS, workspace_bytes=WORKSPACE, **FULL,
    )  # fmt: skip
    in_blocks(plans)


def test_the_librarys_products_by_parts_of_a_tile(plans, monkeypatch):
    """dW's accumulator in fp32 may leave less than a tile's columns."""
    monkeypatch.setattr(
        tiles, "default_variant", lambda *_: Variant(Gemm(32, 256, 32, 4, 2), library=True)
    )
    head = peaked_head(70, 24, 520, bias=True, ignored=0.1)
    got = run(op, head, stats=(), workspace_bytes=28_000, **FULL)
    assert plans[1].cols == 128 and plans[1].block < 70
    assert_grads_close(head, got, **FULL)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_vector_of_all_rows_beside_the_results(trained):
    n, d, v, workspace = N, 8, 10, 9_000
    head = peaked_head(n, d, v, ignored=0.1)
    leaves = [head.hidden, head.weight][: 1 + trained]
    for leaf in leaves:
        leaf.requires_grad_()
    with Sizes() as sizes:
        logps = op(head.hidden, head.weight, head.targets, workspace_bytes=workspace)
        torch.autograd.grad(logps, leaves, head.grad)
    large = sorted(s.nbytes() for s in sizes.made.values() if s.nbytes() >= 4 * n)
    # log-probs; hidden's gradient unscaled and returned; what a trained head keeps: 1 - p_y and
    # the log-sum-exp
    vectors = [4 * n] * (3 if trained else 1)
    buffers = [size for size in large if size not in (4 * n, 4 * n * d)]
    assert [size for size in large if size in (4 * n, 4 * n * d)] == [*vectors, *[4 * n * d] * 2]
    assert len(buffers) == 1 + trained and max(buffers) <= workspace


def test_a_target_outside_the_vocabulary_gives_nan():
    """On a GPU, where nobody waits to look at it, the kernels do; on a CPU the op would raise."""
    head = peaked_head(70, 16, 90, ignored=0.2)
    targets = head.targets.clone()
    bad = torch.zeros(70, dtype=torch.bool)
    for row, target in ((4, 90), (33, -1), (69, 2**40)):
        targets[row], bad[row] = target, True
    options: dict[str, Any] = dict(
        rounded=torch.float32, adapter=None, bias=None, softcap=None, scale=1.0, temperature=1.0,
        ignore_index=-100,
    )  # fmt: skip
    got = driver.forward(
        head.hidden, head.weight, targets, **options, stats=STATS, need_hidden_grad=True,
        need_weight_grad=True, need_bias_grad=False, keep=True, workspace_bytes=2**20,
    )  # fmt: skip
    assert torch.equal(got.token_logps.isnan(), bad)
    assert got.stats is not None
    for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
        assert torch.equal(getattr(got.stats, name).isnan(), bad), name
    assert got.stats.is_top1 is not None and not got.stats.is_top1[bad].any()
    assert got.hidden_grad is not None and not got.hidden_grad[bad].any()
    grad, _ = driver.weight_grad(
        head.hidden, head.weight, targets, got.saved, head.grad, **options,
        workspace_bytes=2**20, need_weight_grad=True, need_bias_grad=False,
    )  # fmt: skip
    kept = run(op, head, stats=())
    rest = ~bad
    assert grad is not None
    assert torch.equal(got.token_logps[rest], kept.logps[rest]) and grad.isfinite().all()
