"""Runs the launchers of the Triton kernels up to the launch itself, for a GPU that is not there.

    python -m tests.kernels.launches [--arch sm90] [--dtype bfloat16 …]

Every launch of the driver goes through Triton's own argument binding and compiler, on CPU tensors;
only the launch is left out. So it shows what ahead-of-time compilation by hand cannot: arguments
that do not fit a kernel, and kernels compiled anew because N changed. One JSON line per launch.
"""

import argparse
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from fastdpo_kernels import linear_logps_triton as driver
from fastdpo_kernels import linear_logps_triton_job as jobs
from fastdpo_kernels import preference_loss_triton as preference
from fastdpo_kernels import tiles
from fastdpo_kernels.impls import adapter_parts
from fastdpo_kernels.linear_logps_triton_math import Logits


class AbsentGPU:
    """What Triton asks a driver for before it launches."""

    def __init__(self, arch: str):
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def stop_before_launch(context: dict) -> None:
    """Makes every launch compile and report instead."""
    run = JITFunction.run

    def report(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert compiled is not None
        line = {"kernel": self.__name__, "grid": grid, "hash": compiled.hash, **context}
        print(json.dumps(line), flush=True)
        return compiled

    JITFunction.run = report


def forward_and_backward(
    device: tiles.Device,
    dtype: torch.dtype,
    n: int,
    *,
    full: bool,
    grad: bool,
    kept: bool,
    r: int = 0,
    workspace: int = 2**28,
    dw: bool = True,
) -> None:
    """`r`: the rank of an adapter; 0: none. `dw`: not the bias alone is trained."""
    d, v = 64, 1000
    width = d + adapter_parts(dtype) * r
    hidden, weight = torch.randn(n, width).to(dtype), torch.randn(v, d).to(dtype)
    targets = torch.randint(0, v, (n,))
    bias = torch.randn(v).to(dtype) if full else None
    logits = Logits.of(bias, 3.0 if full else None, 1.0, 1.0)
    stats = ("entropy",) if full else ()
    matrix = jobs.matrix_of(weight, torch.randn(v, r) if r else None, dtype)
    job = jobs.Job(hidden, dtype, matrix, logits, stats, grad, dw, True, kept, device)
    plan = planned(job, "hidden" if grad else "sums", workspace)
    saved = driver.run_forward(job, targets, -100, plan).saved
    job = jobs.Job(hidden, dtype, matrix, logits, (), False, dw, True, kept, device)
    plan = planned(job, "weight", workspace)
    assert (plan.block < n) == (workspace < 2**28)
    driver.run_weight_grad(job, targets, -100, saved, torch.ones(n), full, plan)


def planned(job: jobs.Job, work: str, workspace: int) -> tiles.Plan:
    problem = jobs.problem_of(job, work, workspace)
    return tiles.plan(problem, tiles.default_variant(problem, job.device), job.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="sm90")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    triton_driver.set_active(AbsentGPU(options.arch))  # pyright: ignore[reportArgumentType]
    context: dict = {}
    stop_before_launch(context)
    device = tiles.Device("absent", options.arch, 132, 8e14, 4e12)
    for name in options.dtype:
        dtype = getattr(torch, name)
        for n in (300, 304, 1):
            context |= {"dtype": name, "n": n}
            forward_and_backward(device, dtype, n, full=False, grad=True, kept=True)
            forward_and_backward(device, dtype, n, full=False, grad=True, kept=False)
            forward_and_backward(device, dtype, n, full=False, grad=False, kept=False)
            forward_and_backward(device, dtype, n, full=True, grad=True, kept=True)
            forward_and_backward(device, dtype, n, full=False, grad=True, kept=False, r=16)
            for kept in (True, False):
                forward_and_backward(device, dtype, n, full=True, grad=True, kept=kept, dw=False)
        for n in (600, 608):  # in blocks of rows: dW's target rows meet fp32 sums
            context |= {"dtype": f"{name} in blocks", "n": n}
            forward_and_backward(
                device, dtype, n, full=True, grad=True, kept=False, workspace=120_000
            )
    for responses in (2, 16):
        context |= {"dtype": "float32", "n": responses}
        cu = torch.arange(responses + 1, dtype=torch.int32)
        pairs = torch.tensor([[0, 1]])
        for loss in preference.LOSSES:
            preference.forward(
                torch.randn(responses), cu, pairs, torch.randn(responses), None,
                beta=0.1, loss_type=loss, label_smoothing=0.0,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
