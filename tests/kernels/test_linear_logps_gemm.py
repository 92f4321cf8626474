"""Products of fp32 matrices on a CPU: which library computes them, and in what precision.

That `linear_logps` is exact by either is tested in test_linear_logps.py, whose larger heads go to
oneDNN where it is used at all; here, the choice and the settings around it.
"""

import functools
import hashlib
import os
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo_kernels import linear_logps, linear_logps_torch_gemm
from fastdpo_kernels.linear_logps_torch_gemm import LEAST, ieee_matmul, onednn_product
from tests import numerics
from tests.kernels.linear_logps_cases import SMALL, TRANSFORMS
from tests.numerics import peaked_head, run

MIB = 2**20
MATMUL: Any = cast(Any, torch.backends.mkldnn).matmul
needs_onednn = pytest.mark.skipif(
    linear_logps_torch_gemm._linear() is None, reason="torch.mm multiplies everything here"
)


class Products(TorchDispatchMode):
    """Notes every matrix product's op, and the precision set for fp32 while it runs."""

    def __init__(self):
        super().__init__()
        self.ops: list[str] = []
        self.precisions: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"):
            self.ops.append(name)
            self.precisions.add(MATMUL.fp32_precision)
        return func(*args, **(kwargs or {}))

    @property
    def by_onednn(self) -> int:
        return self.ops.count("mkldnn::_linear_pointwise")


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_a_product_is_that_of_the_matrices(transposed):
    m, k, n = 129, 512, 1025
    a, b = torch.randn(m, k), torch.randn(n, k)
    if transposed:
        b = b.mT.contiguous().mT
    got = onednn_product(a, b)
    assert got is not None
    # k roundings of partial sums, each at most |a| |b| large
    budget = k * 2.0**-24 * a.double().abs() @ b.double().abs().mT
    assert ((got.double() - a.double() @ b.double().mT).abs() <= budget).all()
    strided = onednn_product(torch.stack([a, a], 2)[:, :, 0], b)
    assert strided is not None and torch.equal(strided, got)


@needs_onednn
def test_what_onednn_does_not_multiply():
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    assert a.numel() * len(b) >= LEAST and onednn_product(a, b) is not None
    assert onednn_product(a[:, :100].contiguous(), b[:, :100].contiguous()) is None  # small
    assert onednn_product(a.double(), b.double()) is None
    assert onednn_product(a.bfloat16(), b.bfloat16()) is None
    assert onednn_product(a, torch.randn(512, 1024)[:, ::2]) is None  # a slow way of oneDNN
    assert onednn_product(a, torch.randn(512, 1024)[:, :512].mT) is None  # the same
    assert onednn_product(a.to("meta"), b.to("meta")) is None
    with torch._subclasses.FakeTensorMode() as fake:
        assert onednn_product(fake.from_tensor(a), fake.from_tensor(b)) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert onednn_product(a, b) is None
        assert not linear_logps_torch_gemm.has_onednn(a.device, a.dtype)


def test_an_op_of_another_kind_is_not_called(monkeypatch):
    linear_logps_torch_gemm._linear.cache_clear()
    monkeypatch.setattr(linear_logps_torch_gemm, "_SCHEMA", "of another torch")
    try:
        assert linear_logps_torch_gemm._linear() is None
    finally:
        linear_logps_torch_gemm._linear.cache_clear()


@pytest.mark.parametrize("workspace_bytes", [256 * MIB, SMALL], ids=["kept", "again"])
@pytest.mark.parametrize("onednn", [pytest.param(True, marks=needs_onednn), False])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_libraries_serve_every_product(onednn, workspace_bytes, transform, dtype, monkeypatch):
    monkeypatch.setattr(linear_logps_torch_gemm, "LEAST", 0)
    if not onednn:
        monkeypatch.setattr(linear_logps_torch_gemm, "_linear", lambda: None)
    head = peaked_head(129, 65, 4097, dtype=dtype, bias=True, ignored=0.1)
    op = functools.partial(linear_logps, impl="torch", workspace_bytes=workspace_bytes)
    with Products() as products:
        actual = run(op, head, **transform)
    assert products.by_onednn == (len(products.ops) if onednn else 0) and len(products.ops) >= 6
    numerics.assert_logps_close(head, actual.logps, **transform)
    numerics.assert_grads_close(head, actual, **transform)
    numerics.assert_stats_close(head, actual.stats, **transform)


SETTINGS = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "matmul": lambda: setattr(MATMUL, "fp32_precision", "bf16"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def as_before():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"  # pyright: ignore[reportAttributeAccessIssue]
    MATMUL.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("v", [1000, 9000], ids=["eager", "chunked"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_no_setting_makes_products_less_exact(setting, v, as_before):
    """A leak would be silent: few CPUs have the instructions, and the budgets hold on others."""
    head = peaked_head(70, 64, v)
    want = run(linear_logps, head)
    setting()
    allowed = MATMUL.fp32_precision
    assert allowed in ("bf16", "tf32")
    with Products() as products:
        got = run(linear_logps, head)
    assert products.ops and products.precisions == {"ieee"}
    assert torch.equal(got.logps, want.logps) and torch.equal(got.d_weight, want.d_weight)
    assert MATMUL.fp32_precision == allowed


def test_the_settings_stay_as_they_were(as_before):
    with ieee_matmul(torch.device("cpu")):
        pass
    torch.backends.fp32_precision = "tf32"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyError), ieee_matmul(torch.device("cpu")):
        assert MATMUL.fp32_precision == "ieee"
        raise KeyError
    assert MATMUL.fp32_precision == "tf32"
    torch.backends.fp32_precision = "bf16"  # pyright: ignore[reportAttributeAccessIssue]
    assert MATMUL.fp32_precision == "bf16"  # it had none of its own, and still follows
    MATMUL.fp32_precision = "tf32"
    with ieee_matmul(torch.device("cpu")):
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.fp32_precision == "tf32"


def test_every_process_gets_the_same_bits():
    again = subprocess.run(
        [sys.executable, "-c", "from tests.kernels.test_linear_logps_gemm import *; print(bits())"],
        capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path),
             "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert again.stdout.split()[-1] == bits()


def bits() -> str:
    result = run(linear_logps, peaked_head(300, 96, 5000))
    tensors = (result.logps, result.d_hidden, result.d_weight)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
