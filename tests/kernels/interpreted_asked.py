"""Every choice of what is trained: the Triton `linear_logps` computes that alone.

`test_linear_logps_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import functools

import pytest
import torch

from fastdpo_kernels import linear_logps_triton as driver
from fastdpo_kernels import linear_logps_triton_job as jobs
from fastdpo_kernels import tiles
from fastdpo_kernels.linear_logps import linear_logps
from fastdpo_kernels.tiles import Gemm, Variant
from tests.kernels.interpreter import patch_once
from tests.kernels.linear_logps_cases import Sizes, Trained
from tests.numerics import assert_each_gradient_alone, peaked_head

# The interpreter computes both sides of every tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
patch_once()
op = functools.partial(linear_logps, impl="triton")
TILE = Gemm(32, 64, 32, 4, 2)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The multiplications of each GEMM that the driver asked for."""
    made = []

    def counted(of):
        def decorated(launcher):
            return lambda *a, **k: made.append(of(*a)) or launcher(*a, **k)

        return decorated

    exponentials = counted(lambda h, w, *_: len(h) * w.numel())
    product = counted(lambda out, a, b: a.numel() * b.shape[1])
    monkeypatch.setattr(jobs, "exp_gemm", exponentials(jobs.exp_gemm))
    monkeypatch.setattr(jobs, "multiply", product(jobs.multiply))
    for name in ("multiply", "multiply_splits"):
        monkeypatch.setattr(driver, name, product(getattr(driver, name)))
    return made


@pytest.mark.parametrize(
    ("r", "kept", "library"),
    [(0, True, False), (0, False, False), (8, True, False), (8, False, False), (0, False, True)],
    ids=["kept", "again", "adapter kept", "adapter again", "library again"],
)
def test_gemms_and_bytes(r, kept, library, products, plans, monkeypatch):
    monkeypatch.setattr(tiles, "default_variant", lambda *_: Variant(TILE, library, split=False))
    if not kept:
        monkeypatch.setattr(driver, "can_keep", lambda *_: False)
    case = Trained(12, 64, 150, r)
    *_, every = case.subsets()
    whole = case.gradients(op, every)
    for wanted in case.subsets():
        products.clear()
        plans.clear()
        with Sizes() as sizes:
            got = case.gradients(op, wanted)
        assert sum(products) == case.products(wanted, kept=kept), wanted
        of_head = {*wanted} & {"weight", "B", "bias"}
        assert len(plans) == 1 + bool(of_head)
        # All that was ever made, the buffers aside: E [N, V] to a multiple of 8, and results
        made = sum(storage.nbytes() for storage in sizes.made.values())
        made -= sum(plan.bytes for plan in plans)
        e_bytes = 4 * case.n * 152 if kept and of_head else 0
        assert made <= e_bytes + case.result_bytes(wanted), wanted
        if kept and of_head == {"bias"}:
            assert plans[-1].bytes == 16 * 256  # what boundaries may take, and nothing else
        for name in of_head:
            assert torch.equal(got[name], whole[name]), f"{name} depends on what else is trained"
    assert case.v * case.d * 4 > 4 * case.n * 152 + case.result_bytes(("bias",))  # dW would show


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bias_in_blocks_of_rows(dtype, plans):
    head = peaked_head(100, 8, 150, dtype=dtype, bias=True, ignored=0.1)
    small = functools.partial(op, workspace_bytes=12_000)
    e_ulp = 0.0 if dtype == torch.float32 else 2.0**-8  # half an ulp of E in bf16
    assert_each_gradient_alone(small, head, [("bias",)], e_ulp=e_ulp, softcap=7.0, scale=1.2)
    *_, forward, backward = plans
    assert forward.rows < 100 and backward.block < 100


def test_a_workspace_that_the_forward_pass_takes_is_enough():
    """Less will do for a bias than for dW."""
    case = Trained(8, 200, 100, 0)
    least = {}
    for name in ("bias", "weight"):
        tried = range(1_000, 100_000, 1_000)
        least[name] = case.least_workspace(op, (name,), tried)
        assert least[name] > tried[0]
    assert least["bias"] < least["weight"]
