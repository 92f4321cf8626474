"""The one-launch sum behind gathered rows: as torch's steps, bit for bit, and it compiles."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton

from fastdpo.rows import RowGather, _sum_into_rows, gather_rows
from tests.kernels.interpreter import needs_interpreter


def check(dtype: torch.dtype, device: str) -> None:
    """Against numpy's sums in fp64; twice, bitwise equal; rows that never occur are 0."""
    rng = np.random.default_rng(0)
    for n_source, n, width in ((1, 1, 1), (7, 0, 3), (5, 40, 700), (60, 90, 33)):
        index = rng.integers(n_source, size=n)
        gather = RowGather.plan(index, n_source).map_tensors(lambda t: t.to(device))
        grad = torch.from_numpy(rng.standard_normal((n, width))).to(device, dtype)
        found = _sum_into_rows(grad, gather)
        expected = np.zeros((n_source, width))
        np.add.at(expected, index, grad.double().cpu().numpy())
        assert found.dtype == dtype and found.shape == (n_source, width)
        # Up to 40 values of size 1 are added in fp32, the sum is rounded to the dtype once.
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(
            found.double().cpu(), torch.from_numpy(expected), rtol=rtol, atol=40 * 4e-7
        )
        assert torch.equal(found, _sum_into_rows(grad, gather))
        source = torch.randn(n_source, 2, width, device=device, dtype=dtype, requires_grad=True)
        gathered = gather_rows(source, gather)
        gathered.backward(torch.ones_like(gathered))
        counts = torch.bincount(gather.index, minlength=n_source)
        assert source.grad is not None
        assert torch.equal(source.grad, counts.to(dtype)[:, None, None].expand_as(source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_of_rows(dtype: torch.dtype) -> None:
    check(dtype, "cpu")


@needs_interpreter
def test_the_kernel_gives_the_same_under_the_interpreter() -> None:
    code = (
        "import torch; from tests.test_rows import check; import fastdpo.rows_triton as kernel; "
        "calls = []; plain = kernel.sum_rows; "
        "kernel.sum_rows = lambda *a: calls.append(a) or plain(*a); "
        "[check(dtype, 'cpu') for dtype in (torch.float32, torch.float16)]; assert calls"
    )
    path = os.pathsep.join([".", "kernels/torch-ext"])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastdpo.rows_triton import BLOCK, _sum_rows_kernel

    names = {"grad_ptr": "*bf16", "order_ptr": "*i64", "bounds_ptr": "*i64", "out_ptr": "*bf16"}
    signature = {**names, "width": "i32", "BLOCK": "constexpr"}
    source = ASTSource(_sum_rows_kernel, signature, {"BLOCK": BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "atom" not in compiled.asm["ptx"]  # a fixed order of additions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_rows_on_a_gpu(dtype: torch.dtype) -> None:
    check(dtype, "cuda")
