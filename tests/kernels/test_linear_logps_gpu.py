"""`linear_logps` on a GPU: each implementation, dtype and subset of gradients within its budget.

What the interpreter cannot show is here: bf16 operands of `tl.dot`, tensor descriptors, library
GEMMs with fp32 results. tests/test_gpu.py has larger shapes. Everything skips without a GPU.
"""

import dataclasses
import functools
import itertools
import time

import pytest
import torch

from fastdpo_kernels import linear_logps, tiles, tuning
from fastdpo_kernels.impls import STATS
from fastdpo_kernels.tiles import Variant
from tests import numerics
from tests.numerics import Head, far_head, flat_head, negative_head, peaked_head, run, sure_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FULL = {"softcap": 7.0, "scale": 1.2, "temperature": 0.8}
# Half an ulp of bf16 for each operand of a gradient's GEMM that is rounded to it: E always; of fp16
# inputs W or H; where E is kept, H with the row's factor. torch on a GPU: E and H, in the dtype.
BF16 = 2.0**-8
ROUNDINGS = {"fp32": 0.0, "fp16": 3 * BF16, "bf16": 2 * BF16}


def on_gpu(head: Head) -> Head:
    tensors = (None if tensor is None else tensor.cuda() for tensor in vars(head).values())
    return Head(*tensors)  # pyright: ignore[reportArgumentType]


def check(head: Head, impl: str, dtype: str, **options) -> None:
    """Everything within its budget, and twice the same bits."""
    transform = {k: v for k, v in options.items() if k != "workspace_bytes"}
    op = functools.partial(linear_logps, impl=impl)
    first, second = (run(op, head, **options) for _ in range(2))
    numerics.assert_logps_close(head, first.logps, **transform)
    numerics.assert_grads_close(head, first, e_ulp=ROUNDINGS[dtype], **transform)
    numerics.assert_stats_close(head, first.stats, **transform)
    for name in ("logps", "d_hidden", "d_weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_each_subset_of_gradients(impl, dtype):
    head = on_gpu(peaked_head(150, 72, 1032, dtype=DTYPES[dtype], bias=True, ignored=0.1))
    names = ("hidden", "weight", "bias")
    subsets = [s for k in range(4) for s in itertools.combinations(names, k)]
    op = functools.partial(linear_logps, impl=impl)
    numerics.assert_each_gradient_alone(op, head, subsets, e_ulp=ROUNDINGS[dtype], softcap=20.0)


HEADS = {
    "peaked": functools.partial(peaked_head, 257, 136, 4104, ignored=0.1),
    "flat": functools.partial(flat_head, 129, 64, 2056),
    "far": functools.partial(far_head, 70, 40, 808, gap=130.0),
    "negative": functools.partial(negative_head, 65, 40, 800, level=300.0),
    "odd": functools.partial(peaked_head, 33, 67, 1001, bias=True),
    "one row": functools.partial(peaked_head, 1, 64, 4097),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("name", HEADS)
def test_inputs_that_broke_others(name, impl, dtype):
    head = on_gpu(HEADS[name](dtype=DTYPES[dtype]))
    check(head, impl, dtype)
    check(head, impl, dtype, workspace_bytes=2**22, **({} if name == "far" else FULL))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_problems_by_all_logits_at_once(dtype):
    """What "auto" takes for them: exact, repeatable, without a wait, and fit to be captured."""
    for name in ("flat", "far", "negative", "odd", "one row"):
        head = on_gpu(HEADS[name](dtype=DTYPES[dtype]))
        check(head, "auto", dtype, **({} if name == "far" else FULL))
    head = on_gpu(HEADS["odd"](dtype=DTYPES[dtype]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = linear_logps(head.hidden, head.weight, head.targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_logps(head.hidden, head.weight, head.targets)
    captured.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, want)


@pytest.mark.parametrize("impl", ["triton", "torch", "auto"])
@pytest.mark.parametrize("scale", [1.0, 1 / 16])
def test_fp16_gradients_of_likely_tokens(impl, scale):
    """Under a GradScaler's loss scale: see test_linear_logps_fp16.py."""
    check(on_gpu(sure_head(48, 96, 504, scale=scale)), impl, "fp16", scale=scale)


def rows_of(kind: str) -> list[Variant]:
    """What the selector may choose from on this device."""
    device = tiles.describe(torch.cuda.current_device())
    every = [Variant(gemm) for gemm in tiles.TABLES[device.arch][kind]]
    return [*every, Variant(tiles.LIBRARY, library=True), Variant(every[0].gemm, split=False)]


@pytest.mark.parametrize("kind", ["half", "rich", "stats", "float32"])
def test_every_row_of_the_table(kind, monkeypatch):
    dtype = "fp32" if kind == "float32" else "bf16"
    head = on_gpu(peaked_head(300, 192, 2056, dtype=DTYPES[dtype], bias=kind == "rich"))
    transform = FULL if kind == "rich" else {}
    for variant in rows_of(kind):
        monkeypatch.setattr(tiles, "default_variant", lambda *_, chosen=variant: chosen)
        op = functools.partial(linear_logps, impl="triton")
        stats = STATS if kind == "stats" else ()
        got = run(op, head, stats=stats, **transform)
        numerics.assert_logps_close(head, got.logps, **transform)
        numerics.assert_grads_close(head, got, e_ulp=ROUNDINGS[dtype], **transform)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_on_the_head(dtype):
    with torch.device("cuda"):
        rng = torch.Generator("cuda").manual_seed(0)
        draw = functools.partial(torch.randn, generator=rng)
        hidden, weight, a, b = draw(40, 64), draw(1032, 64) / 8, draw(8, 64) / 8, draw(1032, 8)
    hidden, weight, a, b = (t.to(DTYPES[dtype]) for t in (hidden, weight, a, b))
    targets = torch.arange(40, device="cuda")
    results = []
    for impl in ("triton", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, a, b)]
        h, a2, b2 = leaves
        logps = linear_logps(h, weight, targets, lora=(a2, b2, 0.5), impl=impl)
        results.append([logps.detach(), *torch.autograd.grad(logps.sum(), leaves)])
    # gradients are rounded to the dtype, twice or three times
    ulp = torch.finfo(DTYPES[dtype]).eps
    assert (results[0][0] - results[1][0]).abs().max() <= 1e-4
    for one, other in zip(*results, strict=True):
        assert (one - other).double().norm() <= (4 * ulp + 1e-5) * other.double().norm()


def test_autocast_copies_no_hidden_states():
    n, d, v, workspace = 16384, 1024, 32000, 2**24
    hidden = torch.randn(n, d, device="cuda", requires_grad=True)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / d**0.5
    targets = torch.randint(v, (n,), device="cuda")

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return linear_logps(hidden, weight, targets, impl="triton", workspace_bytes=workspace)

    forward()  # compiles, measures
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logps = forward()
    peak = torch.cuda.max_memory_allocated() - before
    # the saved gradient, in bf16, and vectors [N]; a copy of the rows would be n d 2 more
    assert peak <= workspace + 2 * n * d + 256 * n
    assert torch.isfinite(logps).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_overlap(dtype):
    """One row for all, and windows on one sequence: as exact as their copies (which a device may
    read another way, in other tiles)."""
    head = on_gpu(peaked_head(150, 64, 1032, dtype=DTYPES[dtype]))
    sequence = head.weight.flatten()[: 8 * 1031 + 64].contiguous()
    for views in (
        {"hidden": head.hidden[:1].expand(150, 64)},
        {"weight": sequence.as_strided((1032, 64), (8, 1))},
    ):
        check(dataclasses.replace(head, **views), "triton", dtype)


def test_a_target_that_is_masked():
    """By a bias of -inf: log-prob -inf, gradients of the smaller vocabulary."""
    head = on_gpu(peaked_head(150, 64, 1032, dtype=torch.float32))
    targets = head.targets.clone()
    targets[::7] = 500
    bias = torch.zeros(1032, device="cuda")
    bias[490:510] = -torch.inf
    masked = dataclasses.replace(head, targets=targets, bias=bias)
    got = run(functools.partial(linear_logps, impl="triton"), masked)
    want = numerics.exact(masked)
    assert torch.equal(got.logps.isneginf(), want.logps.isneginf())
    assert got.logps[::7].isneginf().all()
    # logits of some 20 nat err by an ulp, 2e-6, and gradients by that times 2 |g| max |W| < 10
    for name in ("d_hidden", "d_weight", "d_bias"):
        assert (getattr(got, name).double() - getattr(want, name)).abs().max() < 1e-4, name
    assert got.stats.entropy is not None and got.stats.entropy.isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_bias_alone_makes_no_gradient_of_the_weight(impl):
    n, d, v, workspace = 2048, 1024, 32000, 2**24
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / d**0.5
    bias = torch.zeros(v, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(v, (n,), device="cuda")

    def step():
        logps = linear_logps(
            hidden, weight, targets, bias=bias, impl=impl, workspace_bytes=workspace
        )
        return torch.autograd.grad(logps.sum(), bias)[0]

    step()  # compiles, measures
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grad = step()
    peak = torch.cuda.max_memory_allocated() - before
    # the bias's gradient, its sums in fp32, and vectors [N]; dW would be 2 V D more
    assert peak <= workspace + 8 * v + 256 * n < 2 * v * d
    assert torch.isfinite(grad).all()


def test_another_stream_and_a_graph():
    """Launches follow the current stream, and what runs can be captured."""
    head = on_gpu(peaked_head(200, 64, 2056, dtype=torch.bfloat16))
    want = linear_logps(head.hidden, head.weight, head.targets, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = linear_logps(head.hidden, head.weight, head.targets, impl="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_logps(head.hidden, head.weight, head.targets, impl="triton")
    captured.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, want)


def test_rows_beyond_int32():
    """N V > 2^31 and N D > 2^31: the last rows are as exact as the first."""
    n, d, v = 2**21 + 65, 1032, 1032
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * n * d * 2:
        pytest.skip(f"needs {3 * n * d * 2} bytes of GPU memory, {free} are free")
    rows = peaked_head(65, d, v, dtype=torch.bfloat16)
    small = on_gpu(rows)
    hidden = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    hidden[-65:] = small.hidden
    targets = torch.full((n,), -100, device="cuda")
    targets[-65:] = small.targets
    hidden.requires_grad_()
    logps = linear_logps(hidden, small.weight, targets, impl="triton", workspace_bytes=2**30)
    numerics.assert_logps_close(small, logps[-65:].detach())
    assert not logps[:-65].any()
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    assert not grad[:-65].any() and grad[-65:].any(1).all()


def test_a_new_shape_measures_for_seconds_at_most(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDPO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    head = on_gpu(peaked_head(1024, 512, 32008, dtype=torch.bfloat16))

    def call() -> None:
        with torch.no_grad():
            linear_logps(head.hidden, head.weight, head.targets, impl="triton")
        torch.cuda.synchronize()

    monkeypatch.setattr(tuning, "_WORTH", float("inf"))
    call()  # the kernels that no choice concerns are compiled
    monkeypatch.setattr(tuning, "_WORTH", 0.0)
    started = time.monotonic()
    call()
    # the budget, and one candidate's compilation begun within it
    assert time.monotonic() - started < 2 * tuning._BUDGET + 4
    assert list((tmp_path / "tuning").glob("*.json"))
