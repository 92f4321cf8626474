"""How a pair's cost changes as packs, steps and models grow: fastdpo alone, one sweep at a time.

`python -m benchmarks.bench_scaling`: milliseconds per pair and utilisation over the tokens in a
pack, over the pairs in a step, and over the model's parameters; table, JSON and PNG. On a CPU the
same sweeps over tiny models, which say that it runs and little else.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import ROOT, workloads
from .bench_train_step import reason_of
from .harness import (
    Budget,
    Results,
    arguments,
    command_line,
    default_device,
    environment,
    left_out_lines,
    matmul_flops_per_second,
    table,
)
from .train_cases import SECONDS_NEEDED, Bench, Case, figures

SWEEPS = ("tokens per pack", "pairs per step", "parameters")


def sweeps(*, cuda: bool) -> dict[str, list[tuple[float, Case]]]:
    """By sweep: what grows, and the case that is measured at each size."""
    shape = "1B" if cuda else "tiny"
    max_length = 2048 if cuda else 128
    base = Case(shape, "lora", "ultrafeedback", 16, 4, ("fastdpo",), max_length=max_length)
    packs = (2048, 4096, 8192, 16384, 32768) if cuda else (256, 512, 1024, 2048)
    batches = (2, 4, 8, 16, 32, 64) if cuda else (2, 4, 8, 16)
    shapes = ("0.5B", "1B", "3B", "8B") if cuda else ("tiny", "5M", "12M")
    total = base.pairs_per_step * base.steps  # every batch size trains on as many pairs
    return {
        "tokens per pack": [
            (size, dataclasses.replace(base, max_tokens_per_pack=max(size, max_length)))
            for size in packs
        ],
        "pairs per step": [
            (n, dataclasses.replace(base, pairs_per_step=n, steps=total // n)) for n in batches
        ],
        "parameters": [  # without embeddings, where those are no head
            (_parameters(name), dataclasses.replace(base, shape=name)) for name in shapes
        ],
    }


def _parameters(shape: str) -> float:
    """Of the body and the head: what a token is multiplied with."""
    flops = workloads.flops_by_phase(
        workloads.SHAPES[shape], [[1, 1, 1]], lora=True, live_reference=False
    )
    return (flops["GEMMs"] + flops["log-probs and loss"] / 2) / 4


def measure(results: Results, device: torch.device, budget: Budget) -> list[str]:
    """Measures every size that `results` has not; returns what was left out, with reasons."""
    left_out = []
    peak_flops = matmul_flops_per_second(device)
    for sweep, cases in sweeps(cuda=device.type == "cuda").items():
        for size, case in cases:
            key = f"{sweep}/{size:g}"
            if results.has(key):
                continue
            if not budget.allows(SECONDS_NEEDED[case.shape]):
                left_out.append(f"{key}: no time left")
                continue
            bench = Bench(case, device)
            try:
                found = figures(bench, "fastdpo", bench.measure("fastdpo"), peak_flops)
            except Exception as error:  # the other sizes are still to be measured
                left_out.append(f"{key}: {reason_of(error)}")
                continue
            results.add(
                key,
                sweep=sweep,
                size=size,
                case=case.name,
                ms_per_pair=1e3 / found["pairs_per_second"],
                **{name: found[name] for name in ("mfu", "peak_gib", "waste")},
            )
    return left_out


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    headers = ["sweep", "size", "case", "ms/pair", "mfu", "waste", "peak GiB"]
    columns = ("case", "ms_per_pair", "mfu", "waste", "peak_gib")
    return table(headers, [[r["sweep"], f"{r['size']:g}", *(r[c] for c in columns)] for r in rows])


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A panel a sweep, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(10.5, 3.2), sharey=False)
    for axis, sweep in zip(axes, SWEEPS, strict=True):
        points = [(r["size"], r["ms_per_pair"]) for r in rows if r["sweep"] == sweep]
        if points:
            axis.loglog(*zip(*points, strict=True), marker="o")
        axis.set_xlabel(sweep)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("ms per pair")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.bench_scaling", __doc__)
    options = parser.parse_args(argv)
    device = default_device()
    path = options.output or ROOT / "benchmarks" / "results" / f"scaling_{device.type}.json"
    command = command_line("benchmarks.bench_scaling", argv)
    facts = environment(device, command)
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_scaling: error: {error}\n")
    left_out = measure(results, device, Budget(options.seconds))
    results.extra["left_out"] = left_out
    results.save()
    title = f"{facts['device']['name']}, commit {facts['commit']}"
    if results.rows:
        plot(results.rows, path.with_suffix(".png"), title)
    print(f"{title}; {command}\n{as_table(results.rows)}")
    for line in left_out_lines(left_out):
        print(line)
    return 1 if any(": failed: " in line for line in left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
