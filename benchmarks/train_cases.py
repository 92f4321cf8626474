"""What the training benchmark runs: its matrix of cases, and one case made ready to be measured.

A case is a model, a way to tune it and what its pairs look like; a `Bench` has its pairs and makes
fresh models for every run. Nothing here decides what is shown: see `bench_train_step.py`.
"""

import copy
import dataclasses
import gc
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from . import hh, isolated, peers, phases, workloads

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


TRAINERS = ("fastdpo", "trl", "fastdpo-best", "trl-best", "unsloth")
# fastdpo with other layers, where asked for: compiled, liger-kernel's, recorded as CUDA graphs.
LAYERS = ("fastdpo-compiled", "fastdpo-liger", "fastdpo-graphs")
LENGTHS = ("hh", "ultrafeedback", "long")
# The bars come first: an interrupted run has decided what it could.
FIRST = (
    ("1B", "lora", "hh"),
    ("8B", "lora", "hh"),
    ("8B", "lora", "ultrafeedback"),
    ("1B", "lora", "ultrafeedback"),
    ("0.5B", "full", "hh"),
    ("8B", "qlora", "hh"),
    ("3B", "lora", "hh"),
    ("1B", "lora", "long"),
)
STEPS = {"0.5B": 6, "1B": 6, "3B": 4, "8B": 3}
PAIRS = {"hh": 64, "ultrafeedback": 32, "long": 8}  # a step: 14k, 27k and 33k necessary tokens


def gpu_cases() -> list[Case]:
    """Every model, tuning and kind of lengths; those that the bars speak of first."""
    every = itertools.product(STEPS, ("lora", "qlora", "full"), LENGTHS)
    return [_gpu_case(*names) for names in dict.fromkeys((*FIRST, *every))]


def _gpu_case(shape: str, tuning: str, lengths: str) -> Case:
    max_length = 8192 if lengths == "long" else 2048
    return Case(shape, tuning, lengths, PAIRS[lengths], STEPS[shape], TRAINERS, max_length)


CPU_CASES = (
    Case("tiny-untied", "full", "hh-text", 8, 32, TRAINERS),
    Case("tiny", "full", "hh-text", 8, 32, TRAINERS),
    # For the phases of each kind of lengths.
    Case("5M", "lora", "hh", 4, 2, ("fastdpo",)),
    Case("5M", "lora", "ultrafeedback", 2, 2, ("fastdpo",)),
    Case("5M", "lora", "long", 1, 2, ("fastdpo",), 8192, 16384),
)
SMOKE_CASES = (
    Case("tiny", "lora", "hh", 2, 2, TRAINERS, max_length=64),
    Case("tiny", "full", "ultrafeedback", 2, 1, TRAINERS[:2], max_length=64),
)
# The least seconds to start a run with: what loading and two epochs took, rounded up.
SECONDS_NEEDED = {
    "tiny": 5, "tiny-untied": 5, "5M": 15, "12M": 30, "0.5B": 30, "1B": 40, "3B": 60, "8B": 75,
}  # fmt: skip


@dataclass
class Bench:
    """One case made ready: its pairs, and fresh copies of its models for every run.

    unsloth_python: a Python that has Unsloth; None: this one, if it has.
    """

    case: Case
    device: torch.device
    data: Path = hh.DATA
    epochs: int = 2
    unsloth_python: str | None = None

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

    def models(
        self, *, quantized: bool | None = None
    ) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """The policy and, for full fine-tuning, the reference; frozen LoRA bases are in bf16.

        quantized: whether the policy is NF4; by default where the case is QLoRA.
        """
        gc.collect()  # trainers hold their models in cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        bf16 = self.device.type == "cuda" and self.case.tuning != "full"
        dtype = torch.bfloat16 if bf16 else torch.float32
        peaked = self.case.lengths != "hh-text"  # real targets under a peaked random head: no
        policy = workloads.random_model(self.case.shape, self.device, dtype, peaked=peaked)
        if self.case.tuning == "qlora" if quantized is None else quantized:
            workloads.quantize_nf4(policy)
        return policy, copy.deepcopy(policy) if self.case.tuning == "full" else None

    def absent(self, trainer: str) -> str | None:
        """Why `trainer` can't run this case here, or None."""
        if trainer == "unsloth":
            return peers.unsloth_absent(self.device, self.case.tuning, self.unsloth_python)
        if trainer in LAYERS:
            reason = peers.layers_absent(trainer, self.device, self.case.tuning)
            if reason is not None:
                return reason
        return peers.absent(trainer) or workloads.absent(self.case.tuning)

    def measure(self, trainer: str, seconds: float | None = None) -> dict[str, Any]:
        """A `peers.Timing` by name, `without`: what the trainer lacked of its best, and how it
        was set where that had to give way to memory.

        What rewrites transformers runs in a process of its own, for at most `seconds`. Raises
        `torch.OutOfMemoryError`, `isolated.Failed` for such a process, or what the trainer raises.
        """
        without = peers.without(trainer, self.device)
        if peers.rewrites_transformers(trainer, self.device):
            return isolated.run(self, trainer, seconds) | {"without": without}
        return self.measure_here(trainer) | {"without": without}

    def measure_here(self, trainer: str) -> dict[str, Any]:
        """As `measure`, in this process."""
        for settings in peers.settings(trainer, self.case.pairs_per_step):
            try:
                job = dataclasses.replace(self.job(), **settings)
                timing = peers.run(trainer, job, *self.models(), self.tokenizer)
                return asdict(timing) | {"settings": settings}
            except torch.OutOfMemoryError:
                continue  # outside of this clause, which holds the frames that hold the memory
        raise torch.OutOfMemoryError(f"{trainer} with every setting that it was tried with")

    def profile(self, trainer: str, rates: dict[str, float]) -> dict[str, Any]:
        """Seconds by phase over the second half of a run, and how far from the least they are.

        Layers are as they are: what is compiled has no phases.
        """
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
            "pairs": (last - last // 2) * self.case.pairs_per_step,
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


def figures(
    bench: Bench, trainer: str, measured: dict[str, Any], peak_flops: float
) -> dict[str, Any]:
    """What the table shows of one run. tokens/s and MFU count necessary tokens and FLOPs only."""
    case, lengths = bench.case, bench.lengths
    timing = peers.Timing(**{key: measured[key] for key in peers.TIMED})
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
        "seconds_per_pair": timing.seconds / len(lengths),
        "peak_gib": None if timing.peak_bytes is None else timing.peak_bytes / 2**30,
        **measured,
    }
