"""fp16 gradients of likely tokens under a loss scale: what GradScaler saves must still be there.

They are 1 - p_y times a row of the weight, below fp16's range before the loss scale multiplies
them. The same in Triton's interpreter: interpreted_linear_logps.py.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdpo_kernels import (
    linear_logps,
    linear_logps_call,
    linear_logps_eager,
    linear_logps_torch,
    linear_logps_torch_tiles,
)
from tests import numerics
from tests.numerics import Head, run, sure_head

SCALES = [1.0, 1 / 16]  # of the logits: Granite and Cohere have such


def emulated_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    assert a.dtype == b.dtype == torch.float16
    return a.to(out_dtype) @ b.to(out_dtype)


@pytest.fixture(params=["eager", "eager on a GPU", "torch", "at the maximum", "16-bit GEMMs"])
def e_ulp(request, monkeypatch) -> Iterator[float]:
    """Each way to compute it, and the relative rounding of E there."""
    rounded = 0.0
    if request.param == "eager on a GPU":
        monkeypatch.setattr(linear_logps_eager, "_may_wait", lambda device: False)
    elif request.param != "eager":
        monkeypatch.setattr(linear_logps_call, "is_tiny", lambda *args, **kwargs: False)
        if request.param != "torch":
            monkeypatch.setattr(linear_logps_torch, "OVERFLOW", 0.0)
        if request.param == "16-bit GEMMs":
            halves = property(lambda head: True)
            monkeypatch.setattr(linear_logps_torch_tiles.Head, "halves", halves)
            monkeypatch.setattr(torch, "mm", emulated_mm)
            # half an ulp of E; and of those 2^-28 below a row's largest half a subnormal, V of them
            rounded = numerics.ULP[torch.float16] / 2 + 500 * 2.0**-39
    yield rounded


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_of_likely_tokens(e_ulp, scale):
    head = sure_head(48, 96, 501, scale=scale)
    outcome = run(linear_logps, head, stats=(), scale=scale)
    assert outcome.logps[0] < -0.05 and outcome.logps[-1] > -1e-7
    numerics.assert_logps_close(head, outcome.logps, scale=scale)
    numerics.assert_grads_close(head, outcome, e_ulp=e_ulp, scale=scale)


@pytest.mark.parametrize("scale", SCALES)
def test_the_budget_sees_an_early_rounding(scale):
    """The gradient rounded before it is multiplied, as an unscaled fp16 gradient would be."""
    head = sure_head(48, 96, 501, scale=scale)
    once = Head(head.hidden.float(), head.weight.float(), head.targets, None, head.grad)
    fine = run(linear_logps, once, stats=(), scale=scale)
    coarse = (fine.d_hidden / head.grad[:, None]).half() * head.grad[:, None]
    wrong = numerics.Outcome(
        fine.logps, coarse.half(), fine.d_weight.half(), fine.d_bias, fine.stats
    )
    with pytest.raises(AssertionError, match="d_hidden error"):
        numerics.assert_grads_close(head, wrong, scale=scale)


@pytest.mark.parametrize("far", [200.0, 1000.0])
def test_a_certain_target_has_no_gradient(e_ulp, far):
    """1 - p_y underflows to 0: so does the gradient, and nothing is divided by it."""
    weight = torch.eye(8, 16, dtype=torch.float16)
    hidden = far * weight[:4]
    for autocast in (False, True):  # then the gradient is fp32
        inputs = hidden.float() if autocast else hidden
        leaf = inputs.detach().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            logps = linear_logps(leaf, weight, torch.arange(4))
        logps.backward(torch.full((4,), 2.0**16))
        assert not logps.any() and leaf.grad is not None and not leaf.grad.any()


def test_ignored_rows_have_no_factor(e_ulp):
    head = sure_head(12, 16, 65)
    head.targets[::3] = -100
    head.hidden[::3] = torch.inf
    head.grad.mul_(2.0**-6)  # sums for dW would overflow here
    outcome = run(linear_logps, head, stats=())
    assert not outcome.d_hidden[::3].any() and outcome.d_hidden[1::3].any()
    numerics.assert_grads_close(head, outcome, e_ulp=e_ulp)
