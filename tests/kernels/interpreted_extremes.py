"""Where 32 bits end and loops go round again: the Triton `linear_logps` in the interpreter.

`test_linear_logps_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import functools

import pytest
import torch

from fastdpo_kernels.impls import STATS
from fastdpo_kernels.linear_logps import linear_logps
from tests.kernels.interpreter import patch_once
from tests.numerics import Head, exact, peaked_head, run

# The interpreter computes both sides of every tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
patch_once()
op = functools.partial(linear_logps, impl="triton")


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
