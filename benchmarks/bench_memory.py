"""Peak memory of training steps beyond the weights: fastdpo and TRL on the same pairs, on a CPU.

Counted by PyTorch's profiler, which sees every allocation, those inside kernels too: from the
beginning of training on, so adapters, weights and a reference's copy are there already, and
gradients, optimizer states and activations are not. fp32. On a GPU see bench_train_step's peaks.
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, TrainerCallback

from . import ROOT, peers, workloads
from .harness import Results, command_line, environment, table

DEVICE = torch.device("cpu")
TRAINERS = ("fastdpo", "trl")


@dataclass(frozen=True)
class Case:
    """Two steps of `pairs` pairs with HH's lengths, of at most 512 tokens, in one forward pass."""

    vocab_size: int
    lora: bool
    checkpointing: bool
    pairs: int = 4

    @property
    def key(self) -> str:
        tuning = "lora" if self.lora else "full"
        return f"V {self.vocab_size} {tuning} {'checkpointed' if self.checkpointing else 'kept'}"


CASES = [
    Case(vocab_size, lora, checkpointing)
    for vocab_size in (8000, 32000)
    for lora in (False, True)
    for checkpointing in (True, False)
]


class AllocatedPeak(TrainerCallback):
    """Most bytes allocated at once beyond those that were when training began, by PyTorch's own
    profiler: it sees every allocation, those inside kernels too."""

    def on_train_begin(self, args, state, control, **kwargs):
        gc.collect()  # what an earlier run left, or it would be freed, and subtracted, in this one
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        self.profile.__exit__(None, None, None)
        found: Any = self.profile.profiler
        events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        self.bytes = max(itertools.accumulate(sizes))


def peak_bytes(trainer: str, case: Case) -> int:
    """Of a run of `trainer`; a 2M Llama by shape, with the case's vocabulary."""
    shape = {**workloads.SHAPES["tiny"].to_dict(), "vocab_size": case.vocab_size}

    def model() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(type(workloads.SHAPES["tiny"])(**shape))

    lengths = workloads.LENGTHS["hh"].draw(2 * case.pairs, 512)
    job = peers.Job(
        rows=workloads.random_rows(lengths, case.vocab_size),
        pairs_per_step=case.pairs,
        max_length=512,
        lora=case.lora,
        bf16=False,
        device=DEVICE,
        epochs=1,
        micro_batch=case.pairs,
        gradient_checkpointing=case.checkpointing,
    )
    peak = AllocatedPeak()
    tokenizer = None if trainer == "fastdpo" else demo_tokenizer()
    peers.run(trainer, job, model(), None if case.lora else model(), tokenizer, [peak])
    return peak.bytes


def demo_tokenizer() -> Any:
    """TRL wants one for its padding token, whatever the rows are."""
    from transformers import AutoTokenizer

    from fastdpo import demo

    return AutoTokenizer.from_pretrained(demo.ASSETS / "model")


def measure(results: Results, cases: Sequence[Case]) -> None:
    for case in cases:
        if not results.has(case.key):
            peaks = {trainer: peak_bytes(trainer, case) for trainer in TRAINERS}
            results.add(case.key, **peaks, ratio=peaks["fastdpo"] / peaks["trl"])
            print(results.rows[-1], flush=True)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    mib = [[r["key"], *(r[name] / 2**20 for name in TRAINERS), r["ratio"]] for r in rows]
    return table(["case", "fastdpo MiB", "trl MiB", "ratio"], mib)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_memory", description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON; default: results/memory_cpu.json")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in --output")
    options = parser.parse_args(argv)
    path = options.output or ROOT / "benchmarks" / "results" / "memory_cpu.json"
    facts = environment(DEVICE, command_line("benchmarks.bench_memory", argv))
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_memory: error: {error}\n")
    measure(results, CASES)
    print(f"{facts['device']['name']}, commit {facts['commit']}\n{as_table(results.rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
