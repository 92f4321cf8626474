"""`linear_logps` with a LoRA adapter on the head, in torch: numbers, memory, refusals.

The same in Triton's interpreter: interpreted_linear_logps.py.
"""

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdpo_kernels import linear_logps, linear_logps_call, linear_logps_torch_tiles
from tests.kernels.linear_logps_cases import FLOATS, SMALL, TRANSFORMS, peak_bytes
from tests.numerics import assert_adapter_close, peaked_head

op = functools.partial(linear_logps, impl="torch")


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Heads here are tiny, but not for that: the way of large ones is tested."""
    monkeypatch.setattr(linear_logps_call, "is_tiny", lambda *args, **kwargs: False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_an_adapter(dtype, transform):
    for workspace_bytes in (256 * 2**20, SMALL):  # E kept, and computed again
        assert_adapter_close(
            op, 129, 65, 1025, 5, dtype=dtype, bias=True, ignored=0.1,
            workspace_bytes=workspace_bytes, **transform,
        )  # fmt: skip


@pytest.mark.parametrize("n", [0, 1])
def test_edges(n):
    assert_adapter_close(op, n, 1, 2, 1)


def rounding(hidden, weight, targets, *, lora, **options):
    """With the inner product rounded to one number in the dtype of `hidden`, as layers do."""
    a, b, scaling = lora
    inner = torch.nn.functional.linear(hidden, (scaling * a).to(hidden.dtype))
    joined = torch.cat([weight, b], 1)
    return linear_logps(torch.cat([hidden, inner], 1), joined, targets, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_budget_sees_a_rounded_inner_product(dtype):
    with pytest.raises(AssertionError, match="log-prob error"):
        assert_adapter_close(rounding, 129, 65, 1025, 5, dtype=dtype)


@pytest.mark.parametrize("tiny", [False, True], ids=["torch", "eager"])
def test_a_response_of_256_tokens_errs_below_a_milli_nat(tiny, monkeypatch):
    """DESIGN's bar, against fp64, where the adapter moves logits by 0.6."""
    if tiny:
        monkeypatch.undo()
    head = peaked_head(512, 256, 2049, dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    a = (torch.randn(16, 256, generator=rng) / 16).bfloat16()
    b = (0.05 * torch.randn(2049, 16, generator=rng)).bfloat16()
    want = linear_logps(
        head.hidden.double(), head.weight.double(), head.targets,
        lora=(a.double(), b.double(), 2.0), impl="reference",
    )  # fmt: skip

    def error(op) -> float:
        logps = op(head.hidden, head.weight, head.targets, lora=(a, b, 2.0))
        return (logps - want).view(2, 256).sum(1).abs().max().item()

    assert error(linear_logps) < 1e-3 < error(rounding)


def case(n: int = 30, d: int = 16, v: int = 101, r: int = 4, dtype: torch.dtype = torch.float64):
    head = peaked_head(n, d, v, dtype=dtype, ignored=0.2)
    a, b = torch.randn(r, d, dtype=dtype), torch.randn(v, r, dtype=dtype)
    return head, a, b


def gradients(head, a: Tensor, b: Tensor, impl: str, scaling: float = 0.7):
    leaves = [t.detach().requires_grad_() for t in (head.hidden, a, b)]
    logps = linear_logps(
        leaves[0], head.weight, head.targets, lora=(leaves[1], leaves[2], scaling), impl=impl
    )
    return [logps.detach(), *torch.autograd.grad(logps, leaves, head.grad)]


def test_equals_the_reference_and_the_merged_head():
    head, a, b = case()
    mine = gradients(head, a, b, "torch")
    torch.testing.assert_close(mine, gradients(head, a, b, "reference"))
    merged = linear_logps(head.hidden, head.weight + 0.7 * b @ a, head.targets)
    torch.testing.assert_close(mine[0], merged)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(linear_logps_torch_tiles, "ROWS", 3)
    monkeypatch.setattr(linear_logps_torch_tiles, "COLS", 4)
    head, a, b = case(5, 3, 11, 2)
    leaves = [t.requires_grad_() for t in (head.hidden, a, b)]

    def of(hidden, a, b):
        return op(hidden, head.weight, head.targets, lora=(a, b, 1.3), softcap=9.0)

    assert torch.autograd.gradcheck(of, leaves)


def test_ignored_rows_may_hold_anything():
    head, a, b = case()
    clean = gradients(head, a, b, "torch")
    head.hidden[head.targets == -100] = math.nan
    for got, want in zip(gradients(head, a, b, "torch"), clean, strict=True):
        assert torch.equal(got, want)


def test_only_the_gradients_asked_for():
    head, a, b = case()
    b.requires_grad_()
    linear_logps(head.hidden, head.weight, head.targets, lora=(a, b, 1.0)).sum().backward()
    assert b.grad is not None and a.grad is None
    with torch.no_grad():
        assert not linear_logps(
            head.hidden, head.weight, head.targets, lora=(a, b, 1.0)
        ).requires_grad


def test_under_autocast_it_rounds_as_linear_layers_would():
    head, a, b = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logps(head.hidden, head.weight, head.targets, lora=(a, b, 0.5))
    hidden, weight, a, b = (t.bfloat16() for t in (head.hidden, head.weight, a, b))
    want = linear_logps(hidden, weight, head.targets, lora=(a, b, 0.5))
    assert got.dtype == torch.float32 and torch.equal(got, want)  # 0.5 scales exactly


def test_no_copy_of_the_weight():
    n, d, v, r, workspace = 256, 64, 16384, 8, 2**21
    head = peaked_head(n, d, v)
    a, b = torch.randn(r, d).requires_grad_(), torch.zeros(v, r).requires_grad_()
    hidden = head.hidden.requires_grad_()

    def step():
        linear_logps(
            hidden, head.weight, head.targets, lora=(a, b, 2.0), workspace_bytes=workspace
        ).sum().backward()

    # hidden masked, joined, its gradient joined, scaled, split and summed; dB; [N] vectors
    results = 7 * n * (d + r) * 4 + 2 * v * r * 4 + 24 * 8 * n
    peak = peak_bytes(step)
    assert peak <= workspace + results < v * d * 4


@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_refused(which):
    head, a, b = case()
    with forward_ad.dual_level():
        dual = [head.hidden, a, b]
        dual[which] = forward_ad.make_dual(dual[which], torch.ones_like(dual[which]))
        with pytest.raises(RuntimeError, match="forward"):
            linear_logps(dual[0], head.weight, head.targets, lora=(dual[1], dual[2], 1.0))


def test_refusals():
    head, a, b = case()

    def call(lora, weight=head.weight):
        linear_logps(head.hidden, weight, head.targets, lora=lora)

    with pytest.raises(ValueError, match=r"A \[r, D=16\] and B \[V=101, r\], got \(4, 15\)"):
        call((a[:, :15], b, 1.0))
    with pytest.raises(ValueError, match=r"got \(4, 16\) and \(101, 3\)"):
        call((a, b[:, :3], 1.0))
    with pytest.raises(ValueError, match="scaling must be finite, got inf"):
        call((a, b, math.inf))
    with pytest.raises(ValueError, match=r"must be \(A, B, scaling\), got 2 values"):
        call((a, b))
    with pytest.raises(TypeError, match="float64 mixes with nothing else.*lora's B torch.float32"):
        call((a, b.float(), 1.0))
    with pytest.raises(ValueError, match="weight requires a gradient beneath a lora adapter"):
        call((a, b, 1.0), head.weight.clone().requires_grad_())
