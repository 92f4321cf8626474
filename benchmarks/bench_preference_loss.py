"""The loss of pairs, forward and backward: ours against eager PyTorch, from 16 to 4096 responses.

`python -m benchmarks.bench_preference_loss` prints a table and writes JSON and PNG; the sigmoid
loss, fp32. Both start from the token log-probs of a pack and end with their gradient.
`pytest benchmarks/bench_preference_loss.py` times a small case with pytest-benchmark.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo_kernels import preference_loss
from fastdpo_kernels.reference import preference_loss_reference

from .kernel_runs import Run, backward_step, begin, finish, measure, run_all

BETA = 0.1
RESPONSES = (16, 128, 1024, 4096)
SMOKE_RESPONSES = (4,)
MEAN_TOKENS = 200  # of a response; log-normal with a standard deviation of 0.8 in the logarithm
BYTES_PER_TOKEN = 12  # its log-prob and its reference's read, its gradient written


class Inputs:
    """`n_responses` responses, each two a pair; log-probs as of a model, near its reference's."""

    def __init__(self, n_responses: int, device: torch.device):
        self.n_responses, self.device = n_responses, device
        rng = torch.Generator().manual_seed(0)
        spread = 0.8 * torch.randn(n_responses, generator=rng) - 0.32
        lengths = (MEAN_TOKENS * spread.exp()).long().clamp(min=1)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        n = int(bounds[-1])
        reference = torch.randn(n, generator=rng).sub(1).mul(1.5).exp().neg()
        policy = reference + 0.05 * torch.randn(n, generator=rng)
        self.token_logps = policy.to(device).requires_grad_()
        self.ref_token_logps = reference.to(device)
        self.cu_responses = bounds.int().to(device)
        self.pairs = torch.arange(n_responses).view(-1, 2).to(device)
        self.owner = torch.repeat_interleave(torch.arange(n_responses), lengths).to(device)

    @property
    def n_tokens(self) -> int:
        return len(self.token_logps)

    @cached_property
    def oracle(self) -> tuple[Tensor, Tensor]:
        """fp64 losses of the pairs, and the gradient of their mean."""
        x = self.token_logps.detach().double().requires_grad_()
        losses = preference_loss_reference(
            x, self.cu_responses, self.pairs, self.ref_token_logps.double(), beta=BETA,
            loss_type="sigmoid", label_smoothing=0.0,
        ).losses  # fmt: skip
        (grad,) = torch.autograd.grad(losses.mean(), x)
        return losses.detach(), grad


def fused(inputs: Inputs, impl: str = "auto") -> Tensor:
    return preference_loss(
        inputs.token_logps,
        inputs.cu_responses,
        inputs.pairs,
        inputs.ref_token_logps,
        beta=BETA,
        impl=impl,
    ).losses


def eager(inputs: Inputs) -> Tensor:
    """Sums per response, then the loss of four vectors, as trainers write it."""
    return _eager(inputs.token_logps, inputs.ref_token_logps, inputs.owner, inputs.pairs)


def _eager(token_logps: Tensor, ref_token_logps: Tensor, owner: Tensor, pairs: Tensor) -> Tensor:
    n_responses = pairs.numel()
    logps = token_logps.new_zeros(n_responses).index_add(0, owner, token_logps)
    ref_logps = token_logps.new_zeros(n_responses).index_add(0, owner, ref_token_logps)
    chosen, rejected = logps[pairs[:, 0]], logps[pairs[:, 1]]
    ref_chosen, ref_rejected = ref_logps[pairs[:, 0]], ref_logps[pairs[:, 1]]
    margins = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins)


_COMPILED = torch.compile(_eager, dynamic=False)


def compiled(inputs: Inputs) -> Tensor:
    return _COMPILED(inputs.token_logps, inputs.ref_token_logps, inputs.owner, inputs.pairs)


@dataclass(frozen=True)
class Method:
    name: str
    function: Callable[[Inputs], Tensor]
    seconds: float  # what a row may take


def methods(device: torch.device) -> list[Method]:
    result = [Method("fastdpo", fused, 10.0), Method("eager", eager, 3.0)]
    if device.type == "cuda":  # on a CPU it is what fastdpo runs
        result.append(Method("fastdpo-torch", lambda inputs: fused(inputs, "torch"), 3.0))
    return [*result, Method("compile", compiled, 25.0)]


def figures(method: Method, inputs: Inputs, *, quick: bool) -> dict[str, Any]:
    if method.name == "compile":
        torch.compiler.reset()

    def loss() -> Tensor:
        return method.function(inputs).mean()

    cost = measure(backward_step(loss, [inputs.token_logps], None), inputs.device, quick=quick)
    losses = method.function(inputs)
    (grad,) = torch.autograd.grad(losses.mean(), inputs.token_logps)
    true_losses, true_grad = inputs.oracle
    return {
        "ms": cost.seconds * 1e3,
        "repeats": cost.repeats,
        "gb_per_second": BYTES_PER_TOKEN * inputs.n_tokens / cost.seconds / 1e9,
        "peak_mib": None if cost.peak_bytes is None else cost.peak_bytes / 2**20,
        "loss_error": float((losses.detach().double() - true_losses).abs().max()),
        "grad_error": float((grad.double() - true_grad).abs().max() / true_grad.abs().max()),
    }


def plan(device: torch.device, smoke: bool) -> Iterator[Run]:
    for n_responses in SMOKE_RESPONSES if smoke else RESPONSES:
        inputs = Inputs(n_responses, device)
        case = f"R{n_responses} N{inputs.n_tokens}"
        for method in methods(device):
            yield Run(
                key=f"{case}/{method.name}",
                labels={"case": case, "method": method.name, "n_responses": n_responses},
                absent=None,
                seconds=0.0 if smoke else method.seconds,
                figures=lambda m=method, inputs=inputs: figures(m, inputs, quick=smoke),
            )


COLUMNS = {
    "ms": "ms",
    "x_eager": "x eager",
    "gb_per_second": "GB/s",
    "peak_mib": "peak MiB",
    "loss_error": "loss error",
    "grad_error": "grad error",
}


def summaries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with eager's time over their own."""
    eagers = {row["case"]: row.get("ms") for row in rows if row["method"] == "eager"}
    result = []
    for row in rows:
        theirs, ours = eagers.get(row["case"]), row.get("ms")
        result.append(row | {"x_eager": theirs / ours if theirs and ours else None})
    return result


def main(argv: Sequence[str] | None = None) -> int:
    session = begin("preference_loss", __doc__, argv)
    left_out = run_all(plan(session.device, session.smoke), session.results, session.budget)
    return finish(session, summaries(session.results.rows), COLUMNS, left_out)


@pytest.mark.parametrize("name", ["fastdpo", "eager"])
def test_pairs_on_cpu(benchmark, name):
    """For pytest-benchmark: 128 responses, forward and backward."""
    inputs = Inputs(128, torch.device("cpu"))
    function = {"fastdpo": fused, "eager": eager}[name]
    benchmark(backward_step(lambda: function(inputs).mean(), [inputs.token_logps], None))


if __name__ == "__main__":
    sys.exit(main())
