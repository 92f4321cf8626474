"""What the decoder's layers cost as they are, compiled, as CUDA graphs, with liger's, and in fp8.

`python -m benchmarks.bench_body`: forward and backward of four layers with LoRA on one pack, each
variant over the layers as they are; what `compile`, `cuda_graphs` and `use_liger_kernel` should be
by default is read off its table. Packs follow each other without waiting, as in a step, so that
where the host can't keep up it shows. liger-kernel goes last: it replaces functions that all models
call. Attention is included, embeddings and head are not. Writes JSON, prints a table.
"""

import copy
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastdpo import body
from fastdpo.batch import Pack
from fastdpo.body import apply_liger, compile_layers, compiled_graphs
from fastdpo.fp8 import convert_layers
from fastdpo.logps import prepare_packed_forward
from fastdpo.lora import use_lean_lora
from fastdpo.model import base_model

from . import ROOT
from .bench_lora import Case, autocast, layers_of, make_pack, one_pass
from .bench_train_step import reason_of
from .harness import (
    BROKEN,
    Budget,
    Results,
    arguments,
    command_line,
    default_device,
    environment,
    left_out_lines,
    median,
    synchronize,
    table,
)

RESULTS = ROOT / "benchmarks" / "results"
VARIANTS = ("off", "layers", "graphs", "fp8", "liger")  # as it is first, liger last: see above
COLUMNS = ("seconds", "x off", "paired", "differs", "first s", "graphs", "peak MiB")
N_LAYERS = 4
PASSES = 4  # packs between two looks at the clock
LEAST_TURNS = 3  # however little time is left


def cases(device: torch.device) -> tuple[Case, ...]:
    """The first is a small model in small packs, whose layers wait for the host soonest."""
    if device.type == "cuda":
        return tuple(
            Case(m, t) for m, t in (("0.5B", 2048), ("1B", 8192), ("8B", 8192), ("0.5B", 8192))
        )
    return (Case("D=512", 1024, dtype="float32", sizes=(512, 1536, 8, 2)),)


SMOKE_CASES = (Case("D=64", 256, rank=4, dtype="float32", sizes=(64, 128, 4, 2)),)


def absent(variant: str, device: torch.device) -> str | None:
    """Why `variant` can't be measured here, or None."""
    if variant in ("off", "layers"):
        return None
    if device.type != "cuda":
        return "needs a GPU"
    if variant == "fp8" and torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability 9.0 (Hopper)"
    if variant == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel not installed"
    return None


def make(variant: str, lora: nn.Module, case: Case, device: torch.device) -> nn.Module:
    """A copy of the layers with adapters `lora`, as `variant` has them."""
    model = copy.deepcopy(lora)
    use_lean_lora(model, log=False)
    base = base_model(model)
    if variant == "liger":
        apply_liger(base)
    with autocast(case, device):
        prepare_packed_forward(base)
    if variant == "fp8":
        convert_layers(model)
    base.enable_input_require_grads()  # a first layer is like the others
    model.train()
    if variant in ("layers", "graphs"):
        compile_layers(base, cuda_graphs=variant == "graphs")
    return model


def some_passes(model: nn.Module, pack: Pack, case: Case, grad: Tensor, n: int) -> Tensor:
    """`n` times forward and backward; the last hidden states."""
    hidden = grad
    for _ in range(n):
        torch.compiler.cudagraph_mark_step_begin()  # read by recorded layers alone
        hidden, backward = one_pass(model, pack, case, grad)
        backward()
    return hidden


class Measured:
    """One variant: what its first pass took, and the seconds of those after."""

    def __init__(self, variant: str, lora: nn.Module, case: Case, pack: Pack, grad: Tensor):
        device = pack.input_ids.device
        self.model = make(variant, lora, case, device)
        self.seconds: list[float] = []
        graphs, began = compiled_graphs(), time.perf_counter()
        self.hidden = some_passes(self.model, pack, case, grad, 1).detach().clone()
        synchronize(device)
        self.found: dict[str, float] = {
            "first s": time.perf_counter() - began,
            "graphs": compiled_graphs() - graphs,
        }
        some_passes(self.model, pack, case, grad, 2)  # graphs are recorded after the first
        self.model.zero_grad()
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            some_passes(self.model, pack, case, grad, 1)
            self.found["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20

    def turn(self, pack: Pack, case: Case, grad: Tensor) -> None:
        device = pack.input_ids.device
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        synchronize(device)
        began = clock()
        some_passes(self.model, pack, case, grad, PASSES)
        synchronize(device)
        self.seconds.append((clock() - began) / PASSES)
        self.model.zero_grad()

    def row(self, off: "Measured") -> dict[str, float]:
        """x off: of the fastest turns; paired: the median of ratios within a turn. differs: the
        hidden states from those of the layers as they are, of their size."""
        exact = off.hidden.double()
        return {
            "seconds": min(self.seconds),
            "x off": min(self.seconds) / min(off.seconds),
            "paired": median([a / b for a, b in zip(self.seconds, off.seconds, strict=False)]),
            "differs": float((self.hidden.double() - exact).norm() / exact.norm()),
            **self.found,
        }


def measure(
    case: Case, device: torch.device, rounds: int, budget: Budget
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Rows by variant, and what was left out. liger's turns follow those of the others."""
    adapter = LoraConfig(task_type="CAUSAL_LM", r=case.rank, target_modules="all-linear")
    frozen: Any = layers_of(case, device, N_LAYERS)
    lora: Any = get_peft_model(frozen, adapter)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    pack = make_pack(case, device)
    grad = torch.randn(
        1, pack.n_tokens, frozen.config.hidden_size, device=device, dtype=frozen.dtype
    )
    torch._dynamo.reset()  # the last case's graphs
    made: dict[str, Measured] = {}
    left_out: list[str] = []

    def turns(which: Sequence[str]) -> None:
        for variant in which:
            reason = absent(variant, device)
            if reason is None and variant != "off" and not budget.allows(10.0):
                reason = "no time left"
            if reason is None:
                try:
                    made[variant] = Measured(variant, lora, case, pack, grad)
                except Exception as error:  # the others are still to be measured
                    if variant == "off":
                        raise
                    reason = reason_of(error)
            if reason is not None:
                left_out.append(f"{case.name} {variant}: {reason}")
        for turn in range(rounds):
            if turn >= LEAST_TURNS and not budget.allows(1.0):
                break
            for variant in which:
                if variant in made:
                    made[variant].turn(pack, case, grad)

    turns(VARIANTS[:-1])
    turns(VARIANTS[-1:])
    return {variant: one.row(made["off"]) for variant, one in made.items()}, left_out


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [[row["case"], row["variant"], *(row.get(c) for c in COLUMNS)] for row in rows]
    return table(["case", "layers", *COLUMNS], lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.bench_body", __doc__, picture=False)
    parser.add_argument("--rounds", type=int, default=10, help="turns that each variant has")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(argv)
    device = default_device()
    path = options.output or RESULTS / f"body_{device.type}.json"
    command = command_line("benchmarks.bench_body", argv)
    facts = environment(device, command)
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_body: error: {error}\n")
    if options.smoke:
        body._BACKEND = "aot_eager"  # traced as for inductor, which takes a CPU minutes
    budget = Budget(options.seconds)
    left_out: list[str] = []
    for case in SMOKE_CASES if options.smoke else cases(device):
        if options.only not in case.name or results.has(f"{case.name} off"):
            continue
        if case.name in results.failed:
            left_out.append(f"{case.name}: failed before")
            continue
        if not budget.allows(15.0):
            left_out.append(f"{case.name}: no time left")
            continue
        try:
            rows, reasons = measure(case, device, options.rounds, budget)
        except Exception as error:
            rows, reasons = {}, [f"{case.name}: {reason_of(error)}"]
        for variant, row in rows.items():
            key = f"{case.name} {variant}"
            results.add(key, case=case.name, variant=variant, **row, shape=asdict(case))
        left_out += reasons
        if any("CUDA error" in reason for reason in reasons):
            results.failed.append(case.name)
            results.save()
            return BROKEN  # another process may go on: --resume
    results.extra["left_out"] = left_out
    results.save()
    print(f"{facts['device']['name']}, commit {facts['commit']}; {command}")
    print(as_table(results.rows))
    for line in left_out_lines(left_out):
        print(line)
    return 1 if any(": failed" in line for line in left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
