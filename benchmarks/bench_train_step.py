"""Training, whole trainers side by side: pairs/s, tokens/s, utilisation, peak memory, waste.

`python -m benchmarks.bench_train_step`: on a GPU random models of 0.5B to 8B on pairs of token
ids; on a CPU real HH pairs and a 2M Llama, construction and training timed together. Then a
profile says which phase takes how long, and how far that is from the least. Prints tables and
writes JSON and PNG. `pytest benchmarks/bench_train_step.py` times the CPU case with
pytest-benchmark.
"""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from . import ROOT, hh, peers, phases, workloads
from .harness import (
    Budget,
    Results,
    command_line,
    copy_bytes_per_second,
    default_device,
    environment,
    left_out_lines,
    matmul_flops_per_second,
    median,
    table,
)

RESULTS = ROOT / "benchmarks" / "results"
CPU_SEED = 0


@dataclass(frozen=True)
class Case:
    """One row group of the table: a model, a way to tune it, and what its pairs look like."""

    shape: str
    tuning: str  # lora | qlora | full
    lengths: str  # hh | ultrafeedback | long | hh-text: the real pairs
    pairs_per_step: int
    steps: int  # timed
    trainers: tuple[str, ...]
    max_length: int = 2048
    max_tokens_per_pack: int | None = None  # None: fastdpo's default

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.tuning}-{self.lengths}"


_ALL = ("fastdpo", "trl", "fastdpo-best", "trl-best")
# The bars come first: an interrupted run has decided what it could.
GPU_CASES = (
    Case("1B", "lora", "hh", 16, 12, _ALL),
    Case("8B", "lora", "hh", 16, 8, _ALL),
    Case("8B", "lora", "ultrafeedback", 16, 6, _ALL),
    Case("1B", "lora", "ultrafeedback", 16, 8, _ALL),
    Case("0.5B", "full", "hh", 16, 12, _ALL),
    Case("1B", "full", "ultrafeedback", 16, 8, _ALL),
    Case("8B", "qlora", "hh", 16, 6, _ALL),
    Case("3B", "lora", "hh", 16, 8, _ALL),
    Case("3B", "lora", "ultrafeedback", 16, 6, _ALL),
    Case("1B", "lora", "long", 8, 6, _ALL, max_length=8192),
    Case("8B", "lora", "long", 8, 4, _ALL, max_length=8192),
    Case("3B", "full", "hh", 16, 6, _ALL),
    Case("0.5B", "lora", "ultrafeedback", 16, 8, _ALL),
    Case("8B", "qlora", "ultrafeedback", 16, 4, _ALL),
)
CPU_CASES = (
    Case("tiny-untied", "full", "hh-text", 8, 32, _ALL[:2]),
    Case("tiny", "full", "hh-text", 8, 32, _ALL[:2]),
)
SMOKE_CASES = (
    Case("tiny", "lora", "hh", 2, 2, _ALL, max_length=64),
    Case("tiny", "full", "ultrafeedback", 2, 1, _ALL[:2], max_length=64),
)
# The least seconds to start a run with: what loading and two epochs took, rounded up.
SECONDS_NEEDED = {"tiny": 5, "tiny-untied": 5, "0.5B": 30, "1B": 40, "3B": 60, "8B": 75}


@dataclass
class Bench:
    """One case made ready: its pairs, and fresh copies of its models for every run."""

    case: Case
    device: torch.device
    data: Path = hh.DATA
    epochs: int = 2

    def __post_init__(self) -> None:
        self.tokenizer: PreTrainedTokenizerBase
        n_pairs = self.case.pairs_per_step * self.case.steps
        if self.case.lengths == "hh-text":
            self.rows, self.tokenizer, self.lengths = _hh_text(self.data, n_pairs)
        else:
            self.lengths = workloads.LENGTHS[self.case.lengths].draw(n_pairs, self.case.max_length)
            vocab_size = workloads.SHAPES[self.case.shape].vocab_size
            self.rows = workloads.random_rows(self.lengths, vocab_size)
            self.tokenizer = _no_text_tokenizer()

    def job(self) -> peers.Job:
        cuda = self.device.type == "cuda"
        return peers.Job(
            rows=self.rows,
            pairs_per_step=self.case.pairs_per_step,
            max_length=self.case.max_length,
            lora=self.case.tuning != "full",
            bf16=cuda,
            device=self.device,
            epochs=self.epochs,
            gradient_checkpointing=cuda,
            max_tokens_per_pack=self.case.max_tokens_per_pack,
        )

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """The policy and, for full fine-tuning, the reference; frozen LoRA bases are in bf16."""
        bf16 = self.device.type == "cuda" and self.case.tuning != "full"
        dtype = torch.bfloat16 if bf16 else torch.float32
        peaked = self.case.lengths != "hh-text"  # real targets under a peaked random head: no
        policy = workloads.random_model(self.case.shape, self.device, dtype, peaked=peaked)
        if self.case.tuning == "qlora":
            workloads.quantize_nf4(policy)
        return policy, copy.deepcopy(policy) if self.case.tuning == "full" else None

    def measure(self, trainer: str) -> peers.Timing:
        policy, ref_model = self.models()
        return peers.run(trainer, self.job(), policy, ref_model, self.tokenizer)

    def profile(self, trainer: str, rates: dict[str, float]) -> dict[str, Any]:
        """Seconds by phase over the second half of a run, and how far from the least they are."""
        job = self.job()
        last = job.epochs * job.steps_per_epoch
        watch = phases.ProfileSteps(self.device, last // 2, last)
        policy, ref_model = self.models()
        peers.run(trainer, job, policy, ref_model, self.tokenizer, [watch])
        flops = workloads.flops_by_phase(
            workloads.SHAPES[self.case.shape],
            self.lengths,
            lora=self.case.tuning != "full",
            live_reference=not peers.precomputes_reference(trainer),
        )
        share = (last - last // 2) / job.steps_per_epoch  # of the pairs, in these steps
        return {
            "steps": last - last // 2,
            "wall_seconds": watch.wall,
            "phases": phases.against_least(
                watch.seconds,
                watch.elements,
                {phase: share * count for phase, count in flops.items()},
                element_size=2 if self.device.type == "cuda" else 4,
                **rates,
            ),
        }


def _hh_text(data: Path, n_pairs: int) -> tuple[list[dict], PreTrainedTokenizerFast, np.ndarray]:
    """The first real pairs in a shuffled order, a tokenizer trained on all, and their lengths."""
    published = hh.read_pairs(data)
    tokenizer = hh.train_tokenizer(
        row[side] for row in published for side in ("chosen", "rejected")
    )
    rows = hh.explicit_rows(published)
    order = np.random.default_rng(CPU_SEED).permutation(len(rows))[:n_pairs]
    rows = [rows[i] for i in order]
    columns = [tokenizer([row[key] for row in rows])["input_ids"] for key in rows[0]]
    lengths = np.array([[len(ids) for ids in column] for column in columns]).T
    return rows, tokenizer, lengths + np.array([0, 1, 1])  # and EOS


def _no_text_tokenizer() -> PreTrainedTokenizerFast:
    """What TRL asks for even where the pairs are token ids already: it gives the pad token."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def figures(bench: Bench, trainer: str, timing: peers.Timing, peak_flops: float) -> dict[str, Any]:
    """What the table shows of one run. tokens/s and MFU count necessary tokens and FLOPs only."""
    case, lengths = bench.case, bench.lengths
    together = case.lengths == "hh-text"  # construction and every step, as a user waits for it
    seconds = timing.construction_seconds + timing.training_seconds if together else timing.seconds
    epochs = bench.epochs if together else 1
    flops = workloads.necessary_flops(
        workloads.SHAPES[case.shape],
        lengths,
        lora=case.tuning != "full",
        live_reference=not peers.precomputes_reference(trainer),
    )
    tokens = workloads.necessary_tokens(lengths)
    cpu = bench.device.type == "cpu"
    return {
        "pairs_per_cpu_second": bench.epochs * len(lengths) / timing.cpu_seconds if cpu else None,
        "pairs_per_second": epochs * len(lengths) / seconds,
        "tokens_per_second": epochs * tokens / seconds,
        "mfu": epochs * flops / seconds / peak_flops,
        "waste": 1 - tokens / timing.tokens,
        "peak_gib": None if timing.peak_bytes is None else timing.peak_bytes / 2**30,
        **asdict(timing),
    }


def measure_all(
    cases: Sequence[Case],
    results: Results,
    *,
    device: torch.device,
    data: Path,
    repeats: int,
    budget: Budget,
    peak_flops: float,
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
            reason = peers.absent(trainer) or workloads.absent(case.tuning)
            if reason is None and not budget.allows(SECONDS_NEEDED[case.shape]):
                reason = "no time left"
            if results.has(key) or reason is not None:
                left_out += [f"{key}: {reason}"] if reason else []
                continue
            bench = bench or Bench(case, device, data, epochs)
            row = {"case": case.name, "trainer": trainer, "repeat": repeat}
            try:
                row |= figures(bench, trainer, bench.measure(trainer), peak_flops)
            except torch.OutOfMemoryError:
                left_out.append(f"{key}: out of memory")
                row["error"] = "out of memory"
            except Exception as error:  # a peer's own; the others are still to be measured
                if trainer.startswith("fastdpo"):
                    raise
                row["error"] = f"failed with {type(error).__name__}"
                left_out.append(f"{key}: {row['error']}")
                print(f"{key}: {error}", file=sys.stderr)
            results.add(key, **row)
            speed = row.get("pairs_per_second")
            print(f"{key}: {row.get('error') or f'{speed:.2f} pairs/s'}", file=sys.stderr)
    return left_out


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
        for trainer in ("fastdpo", "trl"):
            key = f"{case.name}/{trainer}/phases"
            reason = peers.absent(trainer) or workloads.absent(case.tuning)
            if reason is None and not budget.allows(SECONDS_NEEDED[case.shape]):
                reason = "no time left"
            if results.has(key) or reason is not None:
                left_out += [f"{key}: {reason}"] if reason else []
                continue
            steps = min(case.steps, 4)
            bench = Bench(dataclasses.replace(case, steps=steps), device, data)
            try:
                found = bench.profile(trainer, rates)
            except torch.OutOfMemoryError:
                left_out.append(f"{key}: out of memory")
                continue
            results.add(key, case=case.name, trainer=trainer, **found)
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
    """Pairs per second, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(s["case"] for s in summary))
    figure, axes = plt.subplots(1, len(cases), figsize=(1 + 2.6 * len(cases), 3.2), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        bars = [s for s in summary if s["case"] == case]
        colours = ["#1f77b4" if s["trainer"].startswith("fastdpo") else "#bbbbbb" for s in bars]
        drawn = axis.bar([s["trainer"] for s in bars], [s["pairs_per_second"] for s in bars])
        for bar, colour in zip(drawn, colours, strict=True):
            bar.set_color(colour)
        axis.bar_label(drawn, fmt="%.3g")
        axis.set_title(case, fontsize=9)
        axis.tick_params(axis="x", rotation=40, labelsize=8)
    axes[0][0].set_ylabel("pairs/s")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_train_step", description=__doc__
    )
    parser.add_argument("--output", type=Path, help="JSON; a PNG of the same name beside it")
    parser.add_argument("--seconds", type=float, help="start no run that won't end within these")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in --output")
    parser.add_argument("--repeats", type=int, help="of every run; medians are shown")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does everything run?")
    parser.add_argument("--no-phases", action="store_true", help="time only, profile nothing")
    parser.add_argument("--data", type=Path, default=hh.DATA, help="folder of the HH pairs (CPU)")
    options = parser.parse_args(argv)
    device = default_device()
    cuda = device.type == "cuda"
    cases = SMOKE_CASES if options.smoke else GPU_CASES if cuda else CPU_CASES
    cases = [case for case in cases if options.only in case.name]
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
    left_out = []
    shared = {"device": device, "data": options.data, "budget": budget}
    repeats = options.repeats or (1 if cuda or options.smoke else 3)
    rates = {"flops_per_second": peak_flops, "bytes_per_second": bandwidth}
    for case in cases:
        left_out += measure_all([case], results, repeats=repeats, peak_flops=peak_flops, **shared)
        if not options.no_phases:
            left_out += profile_all([case], results, rates=rates, **shared)
    summary = summaries(results.rows)
    results.extra |= {"left_out": left_out, "summary": summary}
    results.save()
    title = f"{facts['device']['name']}, commit {facts['commit']}"
    if summary:
        plot(summary, path.with_suffix(".png"), title)
    print(f"{title}; square matmul {peak_flops / 1e12:.2f} TFLOP/s; {command}")
    print(as_table(summary))
    profiled = [row for row in results.rows if "phases" in row]
    if profiled:
        print("\nshare of the time by phase (times the least possible):")
        print(phases_table(profiled))
    for line in left_out_lines(left_out):
        print(line)
    return 0


@pytest.mark.parametrize("trainer", CPU_CASES[0].trainers)
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
