"""Every choice of what is trained: `linear_logps` computes that alone, in GEMMs and in bytes.

In torch, in tiles and all at once; the same in Triton's interpreter: interpreted_asked.py.
"""

import functools

import pytest
import torch

from fastdpo_kernels import linear_logps, linear_logps_eager, linear_logps_torch
from tests.kernels.linear_logps_cases import SMALL, CountMatmuls, Trained, peak_bytes
from tests.numerics import assert_each_gradient_alone, peaked_head


def check(case: Trained, op, *, kept: bool, temporary: int) -> None:
    """The GEMMs, the peak and the bits of every subset; `temporary`: bytes beside its results."""
    *_, every = case.subsets()
    whole = case.gradients(op, every)
    for wanted in case.subsets():
        with CountMatmuls() as count:
            first = case.gradients(op, wanted)
        # But for those of u and through it, r columns wide, which opaque ops hide.
        assert count.products == case.products(wanted, kept=kept), wanted
        again: dict = {}
        peak = peak_bytes(lambda out=again, wanted=wanted: out.update(case.gradients(op, wanted)))
        assert peak <= temporary + case.result_bytes(wanted), wanted
        for name, grad in first.items():
            assert torch.equal(grad, again[name]), f"{name} differs between two runs"
            if name in ("weight", "bias", "B"):
                assert torch.equal(grad, whole[name]), f"{name} depends on what else is trained"


@pytest.mark.parametrize("r", [0, 8], ids=["head", "adapter"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
def test_in_tiles(r, kept):
    case = Trained(64, 256, 10_000, r)
    e_bytes = case.n * case.v * 4
    workspace = e_bytes + 2**23 if kept else SMALL
    # Beside what may be used without it, dW [V, D] would show.
    assert case.v * case.d * 4 > 2**23 + case.result_bytes(("bias",))
    op = functools.partial(linear_logps, impl="torch", workspace_bytes=workspace)
    check(case, op, kept=kept, temporary=workspace)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("r", [0, 8], ids=["head", "adapter"])
def test_all_at_once(r, gpu, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the chunked way ran")

    monkeypatch.setattr(linear_logps_torch, "forward", never)
    if gpu:
        monkeypatch.setattr(linear_logps_eager, "_may_wait", lambda device: False)
    case = Trained(16, 512, 900, r)
    # As `is_tiny` has it; an adapter is joined to a copy of W.
    copies = 3 if r else 0
    width = case.d + r
    temporary = 4 * (6 * case.n * case.v + copies * case.v * width + 4 * case.n * width)
    assert r or case.v * case.d * 4 > temporary + case.result_bytes(("bias",))
    check(case, linear_logps, kept=True, temporary=temporary)


def test_in_a_compiled_graph(monkeypatch):
    head = peaked_head(33, 16, 101, bias=True, ignored=0.2)
    made = []
    weight_grad = linear_logps_torch.weight_grad
    monkeypatch.setattr(
        linear_logps_torch,
        "weight_grad",
        lambda *a, **k: made.append(weight_grad(*a, **k)) or made[-1],
    )
    subsets = [("bias",), ("hidden", "bias"), ("weight", "bias"), ("weight",)]
    op = torch.compile(linear_logps, backend="aot_eager", fullgraph=True)
    assert_each_gradient_alone(op, head, subsets)
    asked = [(dw is not None, db is not None) for dw, db in made]
    assert asked == [("weight" in s, "bias" in s) for s in subsets]


def test_a_workspace_that_the_forward_pass_takes_is_enough_for_a_bias():
    case = Trained(40, 16, 3000, 0)
    tried = range(2_000, 2**20, 9_000)
    op = functools.partial(linear_logps, impl="torch")
    assert case.least_workspace(op, ("bias",), tried) > tried[0]
