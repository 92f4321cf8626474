"""What `linear_logps` accepts, converts and refuses: dtypes, autocast, impl, bad input."""

import contextlib
import logging
import math
import threading
from collections import deque

import pytest
import torch
from torch import Tensor

from fastdpo_kernels import (
    impls,
    late,
    linear_logps,
    linear_logps_call,
    linear_logps_targets,
)
from tests import numerics
from tests.numerics import Head, peaked_head, run


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Heads here are tiny, but not for that: the way of large ones is tested."""
    monkeypatch.setattr(linear_logps_call, "is_tiny", lambda *args, **kwargs: False)


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
        oracle = run(linear_logps, head, impl="reference")  # fp32 on rounded operands
    rounded = Head(head.hidden.bfloat16(), head.weight, head.targets, head.bias, head.grad)
    outside = run(linear_logps, rounded)
    assert torch.equal(under.logps, outside.logps) and under.logps.dtype == torch.float32
    assert torch.equal(under.d_weight, outside.d_weight)
    assert torch.equal(under.d_hidden.bfloat16(), outside.d_hidden)
    for logps in (under.logps, oracle.logps):
        numerics.assert_logps_close(_rounded(rounded), logps)
    double = peaked_head(4, 8, 33, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_logps(double.hidden, double.weight, double.targets).dtype == torch.float64


def test_auto_runs_torch_on_a_cpu_and_says_so_once(caplog):
    impls.log_choice.cache_clear()
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


def test_devices_that_triton_does_not_serve_are_named(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert impls.why_not_triton(device, torch.bfloat16) == (
        "AMD GPUs (ROCm) have no table of tiles yet"
    )
    with pytest.raises(RuntimeError, match=r'AMD GPUs \(ROCm\).*; use impl="auto" or "torch"'):
        impls.choose_impl("linear_logps", "triton", device, torch.bfloat16)
    assert impls.choose_impl("linear_logps", "auto", device, torch.bfloat16) == "torch"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(impls, "_capability", lambda index: (7, 5))
    assert impls.why_not_triton(device, torch.float16) == (
        "it needs compute capability 8.0 (Ampere, bf16) or newer, this is 7.5"
    )
    monkeypatch.setattr(impls, "_capability", lambda index: (8, 9))
    assert impls.why_not_triton(device, torch.float16) is None


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


class Params4bit(torch.nn.Parameter):
    """Stands for bitsandbytes' class of that name."""


class Int8Params(torch.nn.Parameter):
    """The same."""


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
        "device": ((h, w.to("meta"), y), {}, ValueError, "weight is on meta, hidden on cpu; move"),
        "list": ((h, w, [1, 2]), {}, TypeError, "targets must be a tensor, got list"),
        "high": ((h, w, y + 30), {}, ValueError, r"targets\[3\] = 33 is outside \[0, V=33\)"),
        "low": ((h, w, y - 2), {}, ValueError, r"targets\[0\] = -2 is outside"),
        "4-bit": ((h, Params4bit(w), y), {}, TypeError, "weight is a bitsandbytes Params4bit"),
        "8-bit": ((h, Int8Params(w), y), {}, TypeError, "a bitsandbytes Int8Params; dequantize it"),
        "DTensor": ((h, w.as_subclass(DTensor), y), {}, TypeError, "full_tensor"),
        "ZeRO-3": ((h, shard, y), {}, TypeError, "ZeRO-3 shard"),
        "softcap": ((h, w, y), {"softcap": 0.0}, ValueError, "softcap must be positive"),
        "temperature": ((h, w, y), {"temperature": -1}, ValueError, "temperature must be pos"),
        "scale": ((h, w, y), {"scale": math.inf}, ValueError, "scale must be finite"),
        "stat": ((h, w, y), {"stats": ("entropi",)}, ValueError, "called 'entropi'"),
        "one": ((h, w, y), {"stats": "entropy"}, TypeError, r"write stats=\('entropy',\)"),
        "stats": ((h, w, y), {"stats": ("entropy",) * 2}, ValueError, "names one twice"),
        "impl": ((h, w, y), {"impl": "cuda"}, ValueError, "impl='cuda' is unknown"),
        "workspace": ((h, w, y), {"workspace_bytes": 0}, ValueError, "at least 1 .* got 0"),
        "no number": ((h, w, y), {"workspace_bytes": math.nan}, ValueError, "got nan"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name):
    args, options, error, message = bad_calls()[name]
    with pytest.raises(error, match=message) as caught:
        linear_logps(*args, **options)
    assert str(caught.value).startswith("linear_logps: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("n", "d", "v"), [(2**31, 1, 5), (3, 2**31, 5), (3, 1, 2**31)])
def test_dimensions_beyond_int32_are_refused(n, d, v):
    h, w = torch.empty(n, d, device="meta"), torch.empty(v, d, device="meta")
    message = f"N={n}, D={d}, V={v}, but a dimension holds fewer than 2.31=2147483648"
    with pytest.raises(ValueError, match=message):
        linear_logps(h, w, torch.empty(n, dtype=torch.int64, device="meta"))


def test_other_ignore_indices():
    head = peaked_head(5, 8, 33)
    targets = torch.tensor([3, 0, 7, 0, 1])
    logps = linear_logps(head.hidden, head.weight, targets, ignore_index=0)
    assert logps[[1, 3]].eq(0).all() and logps[[0, 2, 4]].lt(0).all()
    with pytest.raises(ValueError, match=r"targets\[1\] = -100 .* ignore_index=0"):
        linear_logps(
            head.hidden, head.weight, targets.masked_fill(targets == 0, -100), ignore_index=0
        )


def test_a_devices_late_report_of_a_bad_target_is_raised_when_it_has_arrived(monkeypatch):
    """On a GPU the host learns of a bad target later; here with a stand-in for its event."""

    class Event:
        ready = False

        def query(self):
            return self.ready

    event, looks = Event(), []

    def keep(look, report):
        looks.append(look)
        late._pending.append((event, look, (report,)))

    monkeypatch.setattr(linear_logps_targets, "check_later", keep)
    linear_logps_targets.check_targets(torch.tensor([0, 40], device="meta"), 33, -100)
    late._pending.clear()
    late._pending.append((event, looks[0], (torch.tensor([0, 0, 5]),)))
    late._pending.append((event, looks[0], (torch.tensor([1, 7, 40]),)))
    late.raise_late()
    event.ready = True
    with pytest.raises(ValueError, match=r"earlier call.*targets\[7\] = 40 is outside \[0, V=33\)"):
        late.raise_late()
    assert not late._pending


def test_a_report_is_taken_by_one_thread(monkeypatch):
    """Autograd's threads ask too: none may take the next report for the one that has arrived."""
    looked, both = [], threading.Barrier(2)

    class Arrived:
        def query(self):
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # both threads have asked before either takes it, if they can
            return True

    class Underway:
        def query(self):
            return False

    reports = [(Arrived(), looked.append, ("first",)), (Underway(), looked.append, ("second",))]
    monkeypatch.setattr(late, "_pending", deque(reports))
    threads = [threading.Thread(target=late.raise_late) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert looked == ["first"] and len(late._pending) == 1


def test_reports_wait_while_a_cuda_graph_is_captured(monkeypatch):
    """Asking any event then fails, and ends the capture: warm-up leaves some unasked."""

    class Event:
        def query(self):
            raise AssertionError("asked during a capture")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(late, "_pending", deque([(Event(), print, ())]))
    late.raise_late()
    assert len(late._pending) == 1


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
