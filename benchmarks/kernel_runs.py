"""What the two kernel benchmarks share: one step measured, options, table and picture.

A method that raises becomes a row with its error; one that is absent is named and not run; one
that would not end in time is named too. Which methods and shapes there are: the benchmarks' own.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ROOT
from .harness import (
    Budget,
    Results,
    command_line,
    default_device,
    environment,
    median,
    synchronize,
    table,
    timed,
)

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Cost:
    """Median seconds of a step, of how many, and bytes beyond what was allocated (CUDA only)."""

    seconds: float
    repeats: int
    peak_bytes: int | None


def measure(step: Callable[[], Any], device: torch.device, *, quick: bool = False) -> Cost:
    """Times `step`, which leaves nothing allocated, after three calls that warm up.

    Half a second of repeats, between 5 and 50 (on a CPU between 3 and 20); `quick`: one.
    """
    timed(step, device, repeats=1, warmup=0 if quick else 2)
    (once,) = timed(step, device, repeats=1, warmup=0)
    least, most = (5, 50) if device.type == "cuda" else (3, 20)
    repeats = 1 if quick else min(max(int(0.5 / max(once, 1e-6)), least), most)
    seconds = median(timed(step, device, repeats=repeats, warmup=0))
    if device.type != "cuda":
        return Cost(seconds, repeats, None)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return Cost(seconds, repeats, torch.cuda.max_memory_allocated(device) - before)


def backward_step(
    function: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor | None
) -> Callable[[], None]:
    """Forward and backward in one call; `grad` [N] is ignored where the result is a scalar."""

    def step() -> None:
        out = function()
        torch.autograd.grad(out, leaves, grad if out.ndim else None)

    return step


def failure(error: Exception) -> str:
    """One line of at most 200 characters."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Run:
    """One row to be: its key, what the table groups it by, and the seconds it may need."""

    key: str
    labels: dict[str, Any]
    absent: str | None  # why the method can't run here
    seconds: float
    figures: Callable[[], dict[str, Any]]


def run_all(runs: Iterable[Run], results: Results, budget: Budget) -> list[str]:
    """Measures what `results` lacks, row by row; returns what was left out and why."""
    left_out: dict[str, str] = {}
    for run in runs:
        if results.has(run.key):
            continue
        if run.absent:
            left_out[run.labels["method"]] = run.absent
            continue
        if not budget.allows(run.seconds):
            left_out[run.key] = "no time left"
            continue
        try:
            row = run.figures()
        except Exception as error:  # a peer may raise anything: that is its result
            row = {"error": failure(error)}
        results.add(run.key, **run.labels, **row)
        shown = row.get("error") or f"{row['ms']:.3f} ms"
        print(f"{run.key}: {shown}", file=sys.stderr, flush=True)
    return [f"{name}: {reason}" for name, reason in left_out.items()]


@dataclass(frozen=True)
class Session:
    """One call of a benchmark: where it measures, until when, and where the rows go."""

    device: torch.device
    smoke: bool
    budget: Budget
    results: Results
    path: Path


def begin(name: str, description: str | None, argv: Sequence[str] | None) -> Session:
    """Reads the command line of benchmarks.bench_NAME and opens its results."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{name}", description=description
    )
    parser.add_argument("--output", type=Path, help="JSON; a PNG of the same name beside it")
    parser.add_argument("--seconds", type=float, help="start nothing that won't end within these")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in --output")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    device = torch.device(options.device) if options.device else default_device()
    path = options.output or RESULTS / f"{name}_{device.type}.json"
    facts = environment(device, command_line(f"benchmarks.bench_{name}", argv))
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_{name}: error: {error}\n")
    return Session(device, options.smoke, Budget(options.seconds), results, path)


def finish(
    session: Session,
    summary: Sequence[dict[str, Any]],
    columns: dict[str, str],
    left_out: Sequence[str],
) -> int:
    """Writes the summary and the picture, prints what ran where and, last, the table."""
    results, facts = session.results, session.results.environment
    results.extra |= {"left_out": list(left_out), "summary": list(summary)}
    results.save()
    title = f"{facts['device']['name']}, commit {facts['commit']}"
    measured = [row for row in summary if "error" not in row]
    if measured:
        plot(measured, session.path.with_suffix(".png"), title)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{title}; {facts['command']}\n{versions}")
    for line in left_out:
        print(f"left out: {line}")
    for row in summary:
        if "error" in row:
            print(f"failed: {row['key']}: {row['error']}")
    rows = [[row["case"], row["method"], *(row[c] for c in columns)] for row in measured]
    print(table(["case", "method", *columns.values()], rows))
    return 0


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Milliseconds, a panel a case; ours in blue."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    across = min(len(cases), 6)
    down = -(-len(cases) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(1 + 2.6 * across, 0.5 + 2.9 * down), squeeze=False
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        bars = [row for row in rows if row["case"] == case]
        colours = ["#1f77b4" if row["method"].startswith("fastdpo") else "#bbbbbb" for row in bars]
        drawn = axis.bar(
            [row["method"] for row in bars], [row["ms"] for row in bars], color=colours
        )
        axis.bar_label(drawn, fmt="%.3g", fontsize=7)
        axis.set_title(case, fontsize=8)
        axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis.set_ylabel("ms", fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
