"""The loss of pairs: forward and backward of `preference_loss` beside the usual padded formulation.

`python -m benchmarks.bench_preference_loss`. Token log-probs are given; what is timed are segment
sums, losses, rewards and the gradient back to the tokens. "padded" is what trainers do: [2P, L]
log-probs, a mask, a sum, a log-sigmoid; its padding is made beforehand. Tiny beside a training
step: what counts are launches and the host's time. Writes JSON and PNG and prints a table.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo_kernels import preference_loss
from fastdpo_kernels.reference import preference_loss_reference

from . import ROOT
from .harness import (
    Budget,
    Results,
    arguments,
    command_line,
    default_device,
    environment,
    median,
    table,
    timed,
)

RESULTS = ROOT / "benchmarks" / "results"
BETA = 0.1


@dataclass(frozen=True)
class Case:
    """`pairs` pairs whose responses have about `length` tokens (lengths spread as in HH)."""

    pairs: int
    length: int

    @property
    def name(self) -> str:
        return f"P={self.pairs} length~{self.length}"


CASES = (Case(8, 128), Case(64, 128), Case(64, 1024), Case(512, 256))
SMOKE_CASES = (Case(2, 8),)


@dataclass(frozen=True)
class Pack:
    token_logps: Tensor  # [N]
    cu_responses: Tensor  # [R + 1]
    pairs: Tensor  # [P, 2]
    ref_logps: Tensor  # [R]
    padded: Tensor  # [R, L]
    mask: Tensor  # [R, L]


def make_pack(case: Case, device: torch.device) -> Pack:
    rng = torch.Generator().manual_seed(0)
    responses = 2 * case.pairs
    spread = torch.randn(responses, generator=rng).mul(0.8).exp()
    lengths = (case.length * spread).clamp(1, 8 * case.length).long()
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    tokens = -3 * torch.rand(int(cu[-1]), generator=rng)
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    padded = torch.zeros(mask.shape).masked_scatter(mask, tokens)
    reference = torch.stack([part.sum() for part in tokens.split(lengths.tolist())])
    reference += torch.randn(responses, generator=rng)
    pairs = torch.arange(responses).view(2, -1).T.contiguous()
    return Pack(*(x.to(device) for x in (tokens, cu, pairs, reference, padded, mask)))


def work(name: str, pack: Pack) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that gives the loss and its gradient with respect to the token log-probs."""
    leaf = (pack.padded if name == "padded" else pack.token_logps).detach().requires_grad_()

    def padded() -> Tensor:
        logps = (leaf * pack.mask).sum(1)
        chosen, rejected = (logps - pack.ref_logps).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def packed() -> Tensor:
        arguments = (leaf, pack.cu_responses, pack.pairs)
        if name == "reference":
            found = preference_loss_reference(*arguments, ref_logps=pack.ref_logps, beta=BETA)
            return found.losses.mean()
        impl = name.removeprefix("fastdpo ")
        return preference_loss(*arguments, ref_logps=pack.ref_logps, beta=BETA, impl=impl).loss

    def run() -> tuple[Tensor, Tensor]:
        loss = padded() if name == "padded" else packed()
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    return run


def names(device: torch.device) -> tuple[str, ...]:
    ours = ("fastdpo triton", "fastdpo torch") if device.type == "cuda" else ("fastdpo torch",)
    return (*ours, "padded", "reference")


def measure(case: Case, name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median time, and how far the loss is from the fp64 reference."""
    pack = make_pack(case, device)
    run = work(name, pack)
    loss, _ = run()
    exact = preference_loss_reference(
        pack.token_logps.double(), pack.cu_responses, pack.pairs, ref_logps=pack.ref_logps.double(),
        beta=BETA,
    ).losses.mean()  # fmt: skip
    seconds = median(timed(run, device, repeats=repeats, warmup=3))
    error = abs(float(loss.double() - exact))
    return {"microseconds": 1e6 * seconds, "loss_error": error, "tokens": len(pack.token_logps)}


def as_table(measured: Sequence[dict[str, Any]]) -> str:
    by_key = {row["key"]: row for row in measured}
    lines = []
    for row in measured:
        padded = by_key.get(f"{row['case']} padded")
        ratio = padded["microseconds"] / row["microseconds"] if padded else None
        values = (row["tokens"], row["microseconds"], ratio, row["loss_error"])
        lines.append([row["case"], row["implementation"], *values])
    return table(["case", "implementation", "tokens", "us", "x padded", "loss err"], lines)


def plot(measured: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of microseconds, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in measured))
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(7, 1.9 * len(cases)), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, cases, strict=True):
        of_case = [row for row in measured if row["case"] == name]
        labels = [row["implementation"] for row in of_case]
        axis.barh(labels[::-1], [row["microseconds"] for row in of_case][::-1], color="tab:gray")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("microseconds, forward and backward", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.bench_preference_loss", __doc__)
    parser.add_argument("--repeats", type=int, default=30, help="timed calls; medians are shown")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(argv)
    device = default_device()
    path = options.output or RESULTS / f"preference_loss_{device.type}.json"
    command = command_line("benchmarks.bench_preference_loss", argv)
    facts = environment(device, command)
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_preference_loss: error: {error}\n")
    budget = Budget(options.seconds)
    left_out, longest = [], 1.0
    for case in SMOKE_CASES if options.smoke else CASES:
        for name in names(device):
            key = f"{case.name} {name}"
            if options.only not in key or results.has(key):
                continue
            if not budget.allows(longest):
                left_out.append(f"{key}: out of time")
                continue
            started = budget.spent
            row = measure(case, name, device, options.repeats)
            longest = max(longest, budget.spent - started)
            row |= dataclasses.asdict(case)
            results.add(key, case=case.name, implementation=name, **row)
    results.extra["left_out"] = left_out
    results.save()
    title = f"{facts['device']['name']}, commit {facts['commit']}"
    if results.rows:
        plot(results.rows, path.with_suffix(".png"), title)
    print(f"{title}; {command}")
    print(as_table(results.rows))
    for line in left_out:
        print(f"left out: {line}")
    return 0


@pytest.mark.parametrize("name", names(torch.device("cpu")))
def test_64_pairs_on_cpu(benchmark, name):
    """For pytest-benchmark: forward and backward."""
    benchmark(work(name, make_pack(Case(64, 128), torch.device("cpu"))))


if __name__ == "__main__":
    sys.exit(main())
