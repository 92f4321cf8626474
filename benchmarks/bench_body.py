"""What the decoder's layers cost as they are, compiled, as CUDA graphs, with liger's, and in fp8.

`python -m benchmarks.bench_body`: forward and backward of four layers with LoRA on one pack, each
variant in turns with the layers as they are; what `compile`, `cuda_graphs` and `use_liger_kernel`
should be by default is read off its table. Packs follow each other without waiting, as in a step,
so that where the host can't keep up it shows. What liger-kernel replaces in transformers is there
in its own turns alone. Attention is included, embeddings and head are not. Every variant is written
to the JSON file before the next is made; prints a table.
"""

import copy
import importlib.util
import sys
import time
import types
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

from . import ROOT, end_on_sigterm
from .bench_lora import Case, autocast, layers_of, make_pack, one_pass
from .bench_train_step import reason_of
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
)

RESULTS = ROOT / "benchmarks" / "results"
VARIANTS = ("off", "layers", "graphs", "fp8", "liger")  # as it is first: the others turn with it
# The least seconds to start one with; compiling takes the most. Estimates: unmeasured on a GPU.
SECONDS_NEEDED = {"off": 15.0, "layers": 45.0, "graphs": 45.0, "fp8": 20.0, "liger": 20.0}
COLUMNS = ("seconds", "x off", "paired", "differs", "first s", "graphs", "peak MiB")
N_LAYERS = 4
PASSES = 4  # packs between two looks at the clock
LEAST_TURNS = 3  # however little time is left
NO_PEAK = "graphs: no peak MiB, they replay in memory that was taken when they were recorded"


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


class Replaced:
    """What making layers replaces in their module of transformers, there inside `with` alone.

    liger-kernel's rotary embedding and classes are; all models' layers look them up by name.
    """

    def __init__(self, module: types.ModuleType):
        self.module = module
        self.names: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.plain = dict(vars(self.module))
        for name, value in self.names.items():
            setattr(self.module, name, value)

    def __exit__(self, *_: object) -> None:
        now = vars(self.module)
        self.names = {name: now[name] for name, of in self.plain.items() if now[name] is not of}
        for name in self.names:
            setattr(self.module, name, self.plain[name])


class Measured:
    """One variant made, and what its first passes showed.

    peak MiB: allocated by a pass. None for CUDA graphs: theirs is in a pool since they were
    recorded, and a replay allocates nothing.
    """

    def __init__(self, variant: str, lora: nn.Module, case: Case, pack: Pack, grad: Tensor):
        self.pack, self.case, self.grad = pack, case, grad
        self.device = pack.input_ids.device
        self.replaced = Replaced(sys.modules[type(base_model(lora)).__module__])
        with self.replaced:
            self._first_passes(variant, lora)

    def _first_passes(self, variant: str, lora: nn.Module) -> None:
        pack, case, grad, device = self.pack, self.case, self.grad, self.device
        self.model = make(variant, lora, case, device)
        graphs, began = compiled_graphs(), time.perf_counter()
        self.hidden = some_passes(self.model, pack, case, grad, 1).detach().clone()
        synchronize(device)
        self.found: dict[str, float | None] = {
            "first s": time.perf_counter() - began,
            "graphs": compiled_graphs() - graphs,
            "peak MiB": None,
        }
        some_passes(self.model, pack, case, grad, 2)  # graphs are recorded after the first
        self.model.zero_grad()
        if device.type == "cuda" and variant != "graphs":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            some_passes(self.model, pack, case, grad, 1)
            self.found["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            self.model.zero_grad()

    def turn(self) -> float:
        """Seconds of a pass; on a CPU those of all threads."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        with self.replaced:
            synchronize(self.device)
            began = clock()
            some_passes(self.model, self.pack, self.case, self.grad, PASSES)
            synchronize(self.device)
            seconds = (clock() - began) / PASSES
        self.model.zero_grad()
        return seconds

    def row(self, off: "Measured", rounds: int, budget: Budget) -> dict[str, float | None]:
        """After turns in which `off`, the layers as they are, goes first, or alone.

        x off: of the fastest turns; paired: the median of ratios within a turn. differs: the hidden
        states from those of the layers as they are, of their size.
        """
        ours: list[float] = []
        theirs = ours if off is self else []
        for turn in range(rounds):
            if turn >= LEAST_TURNS and not budget.allows(1.0):
                break
            if off is not self:
                theirs.append(off.turn())
            ours.append(self.turn())
        exact = off.hidden.double()
        return {
            "seconds": min(ours),
            "x off": min(ours) / min(theirs),
            "paired": median([a / b for a, b in zip(ours, theirs, strict=True)]),
            "differs": float((self.hidden.double() - exact).norm() / exact.norm()),
            **self.found,
        }


def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    budget: Budget,
    results: Results,
    left_out: list[str],
) -> None:
    """Adds a row for each variant as soon as it is measured, a line for each that is left out.

    Raises `CudaIsBroken` where nothing more can be measured in this process.
    """
    todo = []
    for variant in VARIANTS:
        key = f"{case.name} {variant}"
        reason = "failed before" if key in results.failed else absent(variant, device)
        if reason is not None:
            left_out.append(f"{key}: {reason}")
        elif not results.has(key):
            todo.append(variant)
    if not todo or f"{case.name} off" in results.failed:
        return
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
    off = None
    for variant in dict.fromkeys(("off", *todo)):
        key, one, reason = f"{case.name} {variant}", None, None
        if not budget.allows(SECONDS_NEEDED[variant]):
            reason = "no time left"
        else:
            try:
                one = Measured(variant, lora, case, pack, grad)
                off = off or one
                if variant in todo:
                    row = one.row(off, rounds, budget)
                    results.add(key, case=case.name, variant=variant, **row, shape=asdict(case))
            except Exception as error:  # the others are still to be measured
                reason = reason_of(error)
        if reason is not None:
            left_out.append(f"{key}: {reason}")
        if reason is not None and "CUDA error" in reason:
            results.failed.append(key)
            raise CudaIsBroken(left_out[-1])
        if off is None:  # nothing to turn with
            return


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [[row["case"], row["variant"], *(row.get(c) for c in COLUMNS)] for row in rows]
    notes = [NO_PEAK] if any(row["variant"] == "graphs" for row in rows) else []
    return "\n".join([table(["case", "layers", *COLUMNS], lines), *notes])


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
    end_on_sigterm()
    budget = Budget(options.seconds)
    chosen = SMOKE_CASES if options.smoke else cases(device)
    chosen = [case for case in chosen if options.only in case.name]
    left_out: list[str] = []
    results.extra["left_out"] = left_out
    try:
        for case in chosen:
            measure(case, device, options.rounds, budget, results, left_out)
    except CudaIsBroken as error:  # another process may go on: --resume
        print(f"bench_body: error: {error}", file=sys.stderr)
        return BROKEN
    finally:  # also when it is stopped for time
        named = {line.partition(": ")[0] for line in left_out} | {
            row["key"] for row in results.rows
        }
        keys = [f"{case.name} {variant}" for case in chosen for variant in VARIANTS]
        left_out += [f"{key}: not reached" for key in keys if key not in named]
        results.save()
    print(f"{facts['device']['name']}, commit {facts['commit']}; {command}")
    print(as_table(results.rows))
    for line in left_out_lines(left_out):
        print(line)
    return 1 if any(": failed" in line for line in left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
