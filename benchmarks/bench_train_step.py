"""Training, whole trainers side by side: pairs/s, tokens/s, utilisation, peak memory, waste.

`python -m benchmarks.bench_train_step`: on a GPU random models of 0.5B to 8B, tuned by LoRA, QLoRA
and in full, on pairs of token ids; on a CPU real HH pairs and a 2M Llama, construction and training
timed together. Then a profile says which phase takes how long, and how far that is from the least.
Prints tables and writes JSON and PNG. `pytest benchmarks/bench_train_step.py` times the CPU case
with pytest-benchmark.
"""

import dataclasses
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from . import ROOT, end_on_sigterm, hh, isolated, peers, phases
from .harness import (
    BROKEN,
    Budget,
    CudaIsBroken,
    Results,
    arguments,
    command_line,
    copy_bytes_per_second,
    default_device,
    environment,
    left_out_lines,
    matmul_flops_per_second,
    median,
    table,
)
from .train_cases import (
    CPU_CASES,
    LAYERS,
    SECONDS_NEEDED,
    SMOKE_CASES,
    TRAINERS,
    Bench,
    Case,
    figures,
    gpu_cases,
)

RESULTS = ROOT / "benchmarks" / "results"


def measure_all(
    cases: Sequence[Case],
    results: Results,
    *,
    device: torch.device,
    data: Path,
    repeats: int,
    budget: Budget,
    peak_flops: float,
    unsloth_python: str | None = None,
) -> list[str]:
    """Measures what is not in `results` yet; returns what was left out, each with its reason.

    Trainers take turns, so that a machine that slows down slows all of them.
    """
    left_out = []
    for case in cases:
        epochs = 1 if case.lengths == "hh-text" else 2
        bench = None
        for repeat, trainer in _turns(case, repeats):
            key = f"{case.name}/{trainer}/{repeat}"
            if results.has(key):
                continue
            row = {"case": case.name, "trainer": trainer, "repeat": repeat}
            if not budget.allows(SECONDS_NEEDED[case.shape]):
                left_out.append(f"{key}: no time left")
                continue
            bench = bench or Bench(case, device, data, epochs, unsloth_python)
            if reason := bench.absent(trainer):
                left_out.append(f"{key}: {reason}")
                continue
            seconds = None if budget.seconds is None else budget.left
            try:
                row |= figures(bench, trainer, bench.measure(trainer, seconds), peak_flops)
            except Exception as error:  # the others are still to be measured
                row["error"] = reason_of(error)
            if "error" in row:
                left_out.append(f"{key}: {row['error']}")
            results.add(key, **row)
            speed = row.get("pairs_per_second")
            print(f"{key}: {row.get('error') or f'{speed:.2f} pairs/s'}", file=sys.stderr)
            _go_on_after(row)
    return left_out


def _go_on_after(row: dict[str, Any]) -> None:
    if "CUDA error" in row.get("error", ""):
        raise CudaIsBroken(f"{row['case']}, {row['trainer']}: {row['error']}")


def reason_of(error: Exception) -> str:
    """In a line; what is no matter of memory also goes to stderr in full."""
    said = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said:
        return "out of memory"
    if isinstance(error, isolated.Failed):
        print(error, file=sys.stderr)
        return f"failed: {said[-300:]}"
    if "'gpu_memory'" in said:  # fastdpo's plan, before it begins
        return f"does not fit: {said[:300]}"
    if "CUDA error" in said:  # the first of its words, before 400 characters of advice
        said = said[said.index("CUDA error") :][:300]
    traceback.print_exception(error, limit=-12)
    return f"failed: {type(error).__name__}: {said[-300:]}"


def profile_all(
    cases: Sequence[Case],
    results: Results,
    *,
    device: torch.device,
    data: Path,
    budget: Budget,
    rates: dict[str, float],
) -> list[str]:
    """Profiles fastdpo and TRL on every case that is not in `results` yet; returns what is left."""
    left_out = []
    for case in cases:
        for trainer in [name for name in ("fastdpo", "trl") if name in case.trainers]:
            key = f"{case.name}/{trainer}/phases"
            if results.has(key):
                continue
            if not budget.allows(SECONDS_NEEDED[case.shape]):
                left_out.append(f"{key}: no time left")
                continue
            bench = Bench(dataclasses.replace(case, steps=min(case.steps, 4)), device, data)
            if reason := bench.absent(trainer):
                left_out.append(f"{key}: {reason}")
                continue
            try:
                found = bench.profile(trainer, rates)
            except Exception as error:
                found = {"error": reason_of(error)}
                left_out.append(f"{key}: {found['error']}")
            results.add(key, case=case.name, trainer=trainer, **found)
            _go_on_after(found)
    return left_out


def phases_table(rows: Sequence[dict[str, Any]]) -> str:
    """Share of the time by phase, and in brackets how many times the least possible that is."""
    lines = []
    for row in rows:
        cells = []
        for phase in phases.PHASES:
            found = row["phases"][phase]
            times = found["times_least"]
            cells.append(f"{found['share']:.0%}" + (f" ({times:.1f}x)" if times else ""))
        lines.append([row["case"], row["trainer"], *cells])
    return table(["case", "trainer", *phases.PHASES], lines)


def shared_prompts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By case, what gathering shared prompts' rows and its backward take of fastdpo's step.

    share: of the profiled one. of_timed: the same seconds over those of the fastest that was timed
    without a profiler, with the same passes: whatever layers it had, the larger share.
    """
    result = []
    for row in rows:
        if row["trainer"] != "fastdpo" or "phases" not in row:
            continue
        found = row["phases"]["shared prompts"]
        timed = [
            other["seconds_per_pair"]
            for other in rows
            if other["case"] == row["case"] and "seconds_per_pair" in other
            and other["trainer"] in ("fastdpo", "fastdpo-compiled", "fastdpo-liger")
        ]  # fmt: skip
        of_timed = found["seconds"] / row["pairs"] / min(timed) if timed else None
        shares = {"share": found["share"], "of_timed": of_timed}
        result.append({"case": row["case"], **shares, "bar": phases.BAR_OF_SHARED})
    return result


def shared_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a case: see `shared_prompts`."""
    lines = []
    for found in shared_prompts(rows):
        timed = "" if found["of_timed"] is None else f", {found['of_timed']:.2%} of the timed one"
        lines.append(
            f"{found['case']}: sharing prompts takes {found['share']:.2%} of the profiled step"
            f"{timed}; the bar is {found['bar']:.0%}"
        )
    return lines


def without_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What trainers lacked of their best, and where they gave way to memory, a line each."""
    lines: dict[str, None] = {}
    for row in rows:
        if row.get("without"):
            lines[f"{row['trainer']} without: {'; '.join(row['without'])}"] = None
        if row.get("settings", {}).get("gradient_checkpointing"):
            lines[f"{row['case']}, {row['trainer']}: activations recomputed to fit"] = None
    return list(lines)


def _turns(case: Case, repeats: int) -> Iterator[tuple[int, str]]:
    for repeat in range(repeats):
        for trainer in case.trainers:
            yield repeat, trainer


COLUMNS = (
    "pairs_per_second",
    "pairs_per_cpu_second",
    "tokens_per_second",
    "mfu",
    "waste",
    "peak_gib",
    "last_loss",
)


def summaries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case and trainer the medians over repeats, and pairs/s against both of TRL's rows."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "error" not in row and "phases" not in row:
            groups.setdefault((row["case"], row["trainer"]), []).append(row)
    result = []
    for (case, trainer), group in groups.items():
        out: dict[str, Any] = {"case": case, "trainer": trainer, "repeats": len(group)}
        for column in COLUMNS:
            values = [row[column] for row in group]
            out[column] = None if None in values else median(values)
        for other in ("trl", "trl-best"):
            theirs = [row["pairs_per_second"] for row in groups.get((case, other), [])]
            ours = out["pairs_per_second"]
            out[f"x {other}"] = ours / median(theirs) if theirs and trainer != other else None
        result.append(out)
    return result


def as_table(summary: Sequence[dict[str, Any]]) -> str:
    columns = ("pairs_per_second", "x trl", "x trl-best", *COLUMNS[1:])
    names = {
        "pairs_per_second": "pairs/s",
        "pairs_per_cpu_second": "pairs/cpu s",
        "tokens_per_second": "tokens/s",
        "peak_gib": "peak GiB",
    }
    headers = ["case", "trainer", *(names.get(c, c) for c in columns)]
    rows = [[s["case"], s["trainer"], *(s[c] for c in columns)] for s in summary]
    return table(headers, rows)


def plot(summary: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Pairs per second, a panel a case, four in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(s["case"] for s in summary))
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1 + 2.6 * columns, 3.2 * lines), squeeze=False
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        bars = [s for s in summary if s["case"] == case]
        colours = ["#1f77b4" if s["trainer"].startswith("fastdpo") else "#bbbbbb" for s in bars]
        drawn = axis.bar([s["trainer"] for s in bars], [s["pairs_per_second"] for s in bars])
        for bar, colour in zip(drawn, colours, strict=True):
            bar.set_color(colour)
        axis.bar_label(drawn, fmt="%.3g")
        axis.set_title(case, fontsize=9)
        axis.tick_params(axis="x", rotation=40, labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("pairs/s")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.bench_train_step", __doc__)
    parser.add_argument("--repeats", type=int, help="of every run; medians are shown")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--trainers",
        nargs="+",
        choices=(*TRAINERS, *LAYERS),
        help="these, by default those of each case, which has none with other layers",
    )
    parser.add_argument("--unsloth-python", help="a Python that has Unsloth, if not this one")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does everything run?")
    parser.add_argument("--no-phases", action="store_true", help="time only, profile nothing")
    parser.add_argument("--data", type=Path, default=hh.DATA, help="folder of the HH pairs (CPU)")
    options = parser.parse_args(argv)
    end_on_sigterm()
    device = default_device()
    cuda = device.type == "cuda"
    cases = SMOKE_CASES if options.smoke else gpu_cases() if cuda else CPU_CASES
    cases = [case for case in cases if options.only in case.name]
    if options.trainers:
        cases = [
            dataclasses.replace(
                case, trainers=tuple(t for t in (*TRAINERS, *LAYERS) if t in options.trainers)
            )
            for case in cases
        ]
    if not cases:
        parser.error(f"--only {options.only!r} matches no case")
    path = options.output or RESULTS / f"train_step_{device.type}.json"
    command = command_line("benchmarks.bench_train_step", argv)
    facts = environment(device, command)
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_train_step: error: {error}\n")
    budget = Budget(options.seconds)
    peak_flops = matmul_flops_per_second(device)
    bandwidth = copy_bytes_per_second(device)
    results.extra |= {"matmul_tflops": peak_flops / 1e12, "copy_gb_per_second": bandwidth / 1e9}
    left_out: list[str] = []
    common = {"device": device, "data": options.data, "budget": budget}
    repeats = options.repeats or (1 if cuda or options.smoke else 3)
    rates = {"flops_per_second": peak_flops, "bytes_per_second": bandwidth}
    try:
        for case in cases:
            left_out += measure_all(
                [case], results, repeats=repeats, peak_flops=peak_flops,
                unsloth_python=options.unsloth_python, **common,
            )  # fmt: skip
            if not options.no_phases:
                left_out += profile_all([case], results, rates=rates, **common)
    except CudaIsBroken as error:  # another process may go on: --resume
        print(f"bench_train_step: error: {error}", file=sys.stderr)
        return BROKEN
    summary = summaries(results.rows)
    shared = shared_prompts(results.rows)
    results.extra |= {"left_out": left_out, "summary": summary, "shared_prompts": shared}
    results.save()
    title = f"{facts['device']['name']}, commit {facts['commit']}"
    if summary:
        plot(summary, path.with_suffix(".png"), title)
    print(f"{title}; square matmul {peak_flops / 1e12:.2f} TFLOP/s; {command}")
    print(as_table(summary))
    profiled = [row for row in results.rows if "phases" in row]
    if profiled:
        print("\nshare of the time by phase (times the least possible):")
        print("\n".join([phases_table(profiled), *shared_lines(results.rows)]))
    for line in (*without_lines(results.rows), *left_out_lines(left_out)):
        print(line)
    ours_failed = [line for line in left_out if "/fastdpo" in line and ": failed: " in line]
    return 1 if ours_failed else 0


@pytest.mark.parametrize("trainer", ("fastdpo", "trl"))
def test_hh_on_cpu(benchmark, trainer):
    """For pytest-benchmark: 64 real pairs, construction and training together."""
    if reason := peers.absent(trainer):
        pytest.skip(reason)
    if not (hh.DATA / hh.FILE).is_file():
        pytest.skip(f"no HH pairs at {hh.DATA}")
    case = dataclasses.replace(CPU_CASES[0], steps=8)
    bench = Bench(case, torch.device("cpu"), epochs=1)

    def setup():
        return (trainer, bench.job(), *bench.models(), bench.tokenizer), {}

    benchmark.pedantic(peers.run, setup=setup, rounds=3)
    benchmark.extra_info["pairs_per_second"] = len(bench.rows) / benchmark.stats["median"]


if __name__ == "__main__":
    sys.exit(main())
