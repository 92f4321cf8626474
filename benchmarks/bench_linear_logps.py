"""The log-prob kernels side by side: time, TFLOP/s, distance to bare GEMMs, memory, error.

`python -m benchmarks.bench_linear_logps`: bf16 at the heads of Qwen2.5-0.5B, Llama-3.2-1B,
Llama-3.1-8B and Gemma-2-2B on a GPU, small fp32 heads on a CPU. Logits are as peaked as a trained
model's. What decides the bars comes first, so a run that is cut short has it. Writes JSON and PNG
and prints a table. `pytest benchmarks/bench_linear_logps.py` times a CPU case.
"""

import contextlib
import ctypes
import dataclasses
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import ROOT
from .harness import (
    BROKEN,
    Budget,
    CudaIsBroken,
    Results,
    arguments,
    command_line,
    default_device,
    environment,
    left_out_lines,
    median,
    synchronize,
    table,
    timed,
)
from .peers_kernels import (
    IMPLEMENTATIONS,
    MIB,
    NAMES,
    Absent,
    Implementation,
    bare_gemms,
    find,
    gemm_flops,
)

RESULTS = ROOT / "benchmarks" / "results"
MODES = ("frozen", "trained", "forward")
RESPONSE = 256  # rows whose error is measured: one long response


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    v: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.mode} N={self.n} D={self.d} V={self.v}"


@dataclass(frozen=True)
class Head:
    """hidden [N, D], weight [V, D], targets [N], the incoming gradient [N]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor


GPU_HEADS = ((4096, 128256), (896, 151936), (2048, 128256), (2304, 262144))
CPU_SIZES = ((2048, 512, 32000), (512, 256, 8000))
TINY_SIZES = ((16, 16, 100), (64, 64, 1000), (256, 64, 1000), (500, 64, 4000))  # all logits at once
SMOKE_HEADS = ((32, 500),)


def cases(device: torch.device, smoke: bool) -> list[Case]:
    """Every size and mode, those that the bars speak of first."""
    if smoke:
        return [Case(64, d, v, mode) for mode in MODES for d, v in SMOKE_HEADS]
    if device.type != "cuda":
        return [Case(n, d, v, mode) for n, d, v in CPU_SIZES + TINY_SIZES for mode in MODES]
    central = [Case(4096, d, v, mode) for mode in ("frozen", "trained") for d, v in GPU_HEADS]
    rest = [Case(n, d, v, m) for m in MODES for n in (4096, 32768, 512) for d, v in GPU_HEADS]
    return list(dict.fromkeys([*central, *rest]))


def rows(device: torch.device, smoke: bool) -> Iterator[tuple[Case, Implementation]]:
    """The order of measuring: ours, bare GEMMs and TRL everywhere, then everybody else."""
    everything = cases(device, smoke)
    first = [each for each in IMPLEMENTATIONS if each.name in ("fastdpo", "gemms", "trl")]
    rest = [each for each in IMPLEMENTATIONS if each not in first]
    middle = [case for case in everything if case.n == everything[0].n]
    for some, them in ((middle, first), (middle, rest), (everything, first), (everything, rest)):
        yield from ((case, each) for case in some for each in them if case.mode in each.modes)


def peaked_head(case: Case, device: torch.device, dtype: torch.dtype) -> Head:
    """Logits with Zipf's unigram frequencies; a third of the targets favoured by up to 30 nat."""
    n, d, v = case.n, case.d, case.v
    rng = torch.Generator(device).manual_seed(0)
    rank = torch.arange(1, v + 1, device=device, dtype=torch.float32)
    targets = torch.multinomial(1 / rank, n, replacement=True, generator=rng)
    weight = torch.randn(v, d, generator=rng, device=device) / d**0.5
    weight[:, 0] = -rank.log() / 4
    hidden = 1.5 * torch.randn(n, d, generator=rng, device=device)
    hidden[:, 0] = 4.0
    lift = 30 * torch.rand(n, generator=rng, device=device)
    lift *= torch.rand(n, generator=rng, device=device) < 1 / 3
    chosen = weight[targets]
    hidden += lift[:, None] * chosen / chosen.square().sum(1, keepdim=True)
    grad = torch.randn(n, generator=rng, device=device)
    return Head(hidden.to(dtype), weight.to(dtype), targets, grad)


def truth(head: Head) -> tuple[Tensor, Tensor]:
    """Log-probs and d hidden of the first RESPONSE rows in fp64, on the rounded inputs."""
    hidden, targets = head.hidden[:RESPONSE].double(), head.targets[:RESPONSE]
    chunks = head.weight.split(8192)
    z_y = (hidden * head.weight[targets].double()).sum(1)
    sums = [torch.logsumexp(hidden @ part.double().mT, 1) for part in chunks]
    lse = torch.logsumexp(torch.stack(sums), 0)
    grad = head.weight[targets].double()
    for part in chunks:
        wide = part.double()
        grad -= (hidden @ wide.mT - lse[:, None]).exp() @ wide
    return z_y - lse, grad * head.grad[:RESPONSE, None].double()


class Bench:
    """The inputs of one size, made once for all that are measured on them."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.head = peaked_head(case, device, dtype)
        self.logps, self.d_hidden = truth(self.head)

    def serves(self, case: Case) -> bool:
        return (case.n, case.d, case.v) == (self.case.n, self.case.d, self.case.v)

    def work(self, case: Case, which: Implementation) -> Callable[[], tuple[Tensor, ...]]:
        """A call that gives log-probs [N] (or their sum), and d hidden and dW where due; nothing
        for bare GEMMs. Raises `Absent`."""
        head = self.head
        if which.name == "gemms":
            return bare_gemms(case.mode, head.hidden, head.weight)
        function = find(which.name, self.device, case.n, case.v)
        hidden = head.hidden.detach().requires_grad_(case.mode != "forward")
        weight = head.weight.detach().requires_grad_(case.mode == "trained")
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        upstream = head.grad if which.per_token else None

        def run() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(bool(inputs)):
                out = function(hidden, weight, head.targets)
            if not inputs:
                return (out,)
            grad = None if upstream is None else upstream.to(out.dtype)
            return (out.detach(), *torch.autograd.grad(out, inputs, grad))

        return run

    def measure(self, case: Case, which: Implementation, repeats: int) -> dict[str, Any]:
        """Raises `Absent`, or torch.OutOfMemoryError."""
        work = self.work(case, which)
        result = work()  # compiles, chooses
        # what comes out is not counted: log-probs [N], d hidden, dW
        returned = sum(x.numel() * x.element_size() for x in result)
        errors = self.errors(result) if which.per_token and result else {}
        measured = bool(result)
        del result
        synchronize(self.device)
        peak = peak_bytes(work, self.device) if measured else None
        seconds = median(timed(work, self.device, repeats=repeats, warmup=1))
        return {
            "milliseconds": 1e3 * seconds,
            "tflops": gemm_flops(case.mode, case.n, case.d, case.v) / seconds / 1e12,
            "extra_mib": None if peak is None else max(peak - returned, 0) / MIB,
            **errors,
        }

    def errors(self, result: tuple[Tensor, ...]) -> dict[str, float]:
        """Of the log-probs, at worst in a row and summed over a response; of d hidden, relative."""
        difference = result[0][:RESPONSE].double() - self.logps
        errors = {
            "row_error": float(difference.abs().max()),
            "response_error": float(difference.sum().abs()),
        }
        if len(result) > 1:
            wanted = self.d_hidden
            got = result[1][:RESPONSE].double()
            errors["grad_error"] = float((got - wanted).norm() / wanted.norm())
        return errors


def peak_bytes(work, device: torch.device) -> int | None:
    """What a call allocates at most; on a CPU by the process's resident set, None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system, ...
        Path("/proc/self/clear_refs").write_text("5")  # ... and the peak so far is forgotten
    except (OSError, AttributeError):  # not Linux, not glibc
        return None
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_all(
    results: Results, device: torch.device, budget: Budget, only: str, repeats: int, smoke: bool
) -> list[str]:
    """Measures what is not in `results` yet; returns what was left out, and why."""
    left_out: dict[str, None] = {}
    bench: Bench | None = None
    slowest = 0.0  # seconds per necessary operation of the slowest of late, setup included
    for case, which in rows(device, smoke):
        key = f"{case.name} {which.name}"
        if only not in key or results.has(key) or key in results.failed:
            continue
        flops = gemm_flops(case.mode, case.n, case.d, case.v)
        if not budget.allows(2 + flops * slowest):
            left_out[f"{key}: out of time"] = None
            continue
        started = budget.spent
        if bench is None or not bench.serves(case):
            bench = None
            bench = Bench(case, device)
        try:
            row = bench.measure(case, which, repeats)
        except Absent as reason:
            left_out[f"{which.name}: {reason}"] = None
            continue
        except torch.OutOfMemoryError:
            left_out[f"{key}: out of memory"] = None
            continue
        except Exception as error:  # the others are still to be measured
            left_out[f"{key}: failed with {type(error).__name__}"] = None
            traceback.print_exception(error, limit=-12)
            results.failed.append(key)
            if "CUDA error" in str(error):  # this process can measure nothing any more
                raise CudaIsBroken(f"{key}: {' '.join(str(error).split())[:300]}") from None
            continue
        finally:
            if device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a CUDA that is broken
                    torch.cuda.empty_cache()
        slowest = max(slowest * 0.5, (budget.spent - started - 5) / flops, 1e-15)
        results.add(
            key, case=case.name, implementation=which.name, **dataclasses.asdict(case), **row
        )
    return list(left_out)


COLUMNS = ("milliseconds", "tflops", "x_gemms", "x_trl", "extra_mib", "row_error", "response_error",
           "grad_error")  # fmt: skip


def summaries(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, case by case, with their time over bare GEMMs', and over theirs TRL's, which gives
    what they give: log-probs, or the statistics of TRL's DPOTrainer too."""
    by_key = {row["key"]: row for row in measured}
    shown = []
    for row in measured:
        alike = "trl statistics" if row["implementation"].endswith(" statistics") else "trl"
        gemms, trl = (by_key.get(f"{row['case']} {name}") for name in ("gemms", alike))
        shown.append(
            row
            | {
                "x_gemms": row["milliseconds"] / gemms["milliseconds"] if gemms else None,
                "x_trl": trl["milliseconds"] / row["milliseconds"] if trl else None,
            }
        )
    order = list(dict.fromkeys(row["case"] for row in measured))
    return sorted(
        shown, key=lambda row: (order.index(row["case"]), NAMES.index(row["implementation"]))
    )


def as_table(summary: Sequence[dict[str, Any]]) -> str:
    headers = ["case", "implementation", "ms", "TFLOP/s", "x GEMMs", "x TRL", "extra MiB",
               "row err", "response err", "grad err"]  # fmt: skip
    lines = [
        [row["case"], row["implementation"], *(row.get(column) for column in COLUMNS)]
        for row in summary
    ]
    return table(headers, lines)


def plot(summary: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of time over bare GEMMs' time, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["case"] for row in summary))[:12]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, names, strict=False):
        of_case = [row for row in summary if row["case"] == name]
        relative = all(row["x_gemms"] is not None for row in of_case)
        values = [row["x_gemms"] if relative else row["milliseconds"] for row in of_case]
        labels = [row["implementation"] for row in of_case]
        ours = ["tab:green" if label.startswith("fastdpo") else "tab:gray" for label in labels]
        axis.barh(labels[::-1], values[::-1], color=ours[::-1])
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("time / bare GEMMs" if relative else "milliseconds", fontsize=8)
        axis.tick_params(labelsize=8)
        if relative:
            axis.axvline(1.0, color="black", linewidth=0.8)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.bench_linear_logps", __doc__)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls; medians are shown")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(argv)
    device = default_device()
    path = options.output or RESULTS / f"linear_logps_{device.type}.json"
    command = command_line("benchmarks.bench_linear_logps", argv)
    facts = environment(device, command)
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_linear_logps: error: {error}\n")
    budget = Budget(options.seconds)
    try:
        left_out = measure_all(
            results, device, budget, options.only, options.repeats, options.smoke
        )
    except CudaIsBroken as error:
        results.save()
        print(f"bench_linear_logps: error: {error}", file=sys.stderr)
        return BROKEN
    summary = summaries(results.rows)
    results.extra |= {"left_out": left_out, "summary": summary}
    results.save()
    title = f"{facts['device']['name']}, commit {facts['commit']}"
    if summary:
        plot(summary, path.with_suffix(".png"), title)
    print(f"{title}; {command}")
    print(as_table(summary))
    for line in left_out_lines(left_out):
        print(line)
    if results.failed:
        print(f"failed: {', '.join(results.failed)}")
    return 1 if any(" fastdpo" in key for key in results.failed) else 0


@pytest.mark.parametrize("name", ["fastdpo", "gemms", "eager", "trl"])
@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_cpu_head(benchmark, mode, name):
    """For pytest-benchmark: forward and backward of a small head in fp32."""
    case = Case(512, 256, 8000, mode)
    which = next(each for each in IMPLEMENTATIONS if each.name == name)
    bench = Bench(case, torch.device("cpu"))
    try:
        work = bench.work(case, which)
    except Absent as reason:
        pytest.skip(f"{name} {reason}")
    benchmark(work)


if __name__ == "__main__":
    sys.exit(main())
