"""What LoRA costs over the frozen base: forward and backward of decoder layers, three ways.

`python -m benchmarks.bench_lora`. frozen: no adapter, gradients of activations alone; peft: PEFT's
own layers; fastdpo: the same layers under `fastdpo.lora`. They take turns, so that a ratio is that
of neighbours in time; on a CPU the process's own seconds count. Beside the time stand what doesn't
depend on the machine's mood: FLOPs of products, bytes kept for the backward pass, operations that
make an activation. Attention is included, embeddings and head are not. Writes JSON, prints a table.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fastdpo.batch import Pack
from fastdpo.body import compile_layers
from fastdpo.data import TokenizedPairs
from fastdpo.logps import decoder_output, prepare_packed_forward
from fastdpo.lora import use_lean_lora
from fastdpo.model import base_model
from fastdpo.packing import build_pack

from . import ROOT
from .harness import (
    Budget,
    Results,
    arguments,
    command_line,
    default_device,
    environment,
    median,
    synchronize,
    table,
)
from .workloads import LORA_RANK, SHAPES

RESULTS = ROOT / "benchmarks" / "results"
BAR = 1.12  # the frozen base's time, at most
COLUMNS = ("seconds", "x frozen", "paired", "gflops", "kept MiB", "operations", "peak MiB")


@dataclass(frozen=True)
class Case:
    """Layers of the shape `model` in `dtype`, on one pack of about `tokens`.

    sizes: (hidden, intermediate, heads, key heads) where the shape is none of SHAPES.
    """

    model: str
    tokens: int
    rank: int = LORA_RANK
    dtype: str = "bfloat16"
    sizes: tuple[int, int, int, int] | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} T={self.tokens} r={self.rank}{' compiled' * self.compiled}"


def cases(device: torch.device) -> tuple[Case, ...]:
    if device.type == "cuda":
        plain = [Case(m, t) for m in ("1B", "8B") for t in (8192, 16384)]
        return (*plain, *(Case(m, 8192, compiled=True) for m in ("1B", "8B")))
    return (
        Case("D=512", 2048, dtype="float32", sizes=(512, 1536, 8, 2)),
        Case("D=1024", 2048, dtype="float32", sizes=(1024, 2816, 16, 4)),
    )


SMOKE_CASES = (Case("D=64", 256, rank=4, dtype="float32", sizes=(64, 128, 4, 2)),)


def layers_of(case: Case, device: torch.device, n_layers: int = 2) -> nn.Module:
    config = copy.deepcopy(SHAPES["8B" if case.sizes else case.model])
    config.num_hidden_layers = n_layers
    config.vocab_size = 1024
    if case.sizes:
        (
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        ) = case.sizes
        config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    return model.requires_grad_(False)


def make_pack(case: Case, device: torch.device) -> Pack:
    """Prompts of 128 tokens with two responses of 128."""
    rng = np.random.default_rng(0)
    n = max(case.tokens // 384, 1)
    prompts, chosen, rejected = (
        [rng.integers(1024, size=length).tolist() for _ in range(n)] for length in (128, 129, 129)
    )
    pairs = TokenizedPairs.from_lists(prompts, chosen, rejected)
    return build_pack(pairs, range(n), mode="shared").to(device)


def variants(case: Case, device: torch.device) -> dict[str, nn.Module]:
    frozen = layers_of(case, device)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=case.rank, target_modules="all-linear")
    peft: Any = get_peft_model(copy.deepcopy(frozen), adapter)  # pyright: ignore[reportArgumentType]
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    lean = copy.deepcopy(peft)
    use_lean_lora(lean, log=False)
    models = {"frozen": frozen, "peft": peft, "fastdpo": lean}
    for model in models.values():
        base = base_model(model)
        with autocast(case, device):  # FlexAttention, a GPU's in fp32, lets nobody count inside it
            attention = "sdpa" if case.dtype == "float32" else None
            prepare_packed_forward(base, attn_implementation=attention)
        base.enable_input_require_grads()  # a first layer is like the others
        model.train()
        if case.compiled:
            compile_layers(base)
    return models


def autocast(case: Case, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")


def one_pass(
    model: nn.Module, pack: Pack, case: Case, grad: Tensor | None
) -> tuple[Tensor, Callable[[], None]]:
    """The last hidden states [1, T, D], and what runs their backward pass."""
    with autocast(case, pack.input_ids.device):
        hidden = decoder_output(base_model(model), pack)[0]
    return hidden, lambda: torch.autograd.backward(hidden, grad)


class Operations(TorchDispatchMode):
    """How many operations make or fill a tensor of at least `least` elements."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.n = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.least and not func.is_view:
            self.n += 1
        return out


def count(model: nn.Module, pack: Pack, case: Case, grad: Tensor) -> dict[str, float]:
    """FLOPs, bytes kept between the passes, operations, and on a GPU the peak."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    found: dict[str, float] = {}
    if pack.input_ids.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one_pass(model, pack, case, grad)[1]()
        found["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if case.compiled:  # inside its graphs nothing is counted
        return found
    operations = Operations(pack.n_tokens * 32)
    with FlopCounterMode(display=False) as flops, operations:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            _, backward = one_pass(model, pack, case, grad)
        n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        backward()
    found |= {
        "gflops": flops.get_total_flops() / 1e9,
        "kept MiB": n_bytes / 2**20,
        "operations": operations.n,
    }
    return found


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """By variant. x frozen: of the fastest rounds; paired: the median of ratios within a round."""
    models, pack = variants(case, device), make_pack(case, device)
    hidden = {name: one_pass(model, pack, case, None)[0] for name, model in models.items()}
    grad = torch.randn_like(hidden["frozen"])
    exact = hidden["peft"].detach().double()
    error = float((hidden["fastdpo"].detach().double() - exact).norm() / exact.norm())
    del hidden
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, model in models.items():
            synchronize(device)
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            began = clock()
            one_pass(model, pack, case, grad)[1]()
            synchronize(device)
            if turn >= 2:
                seconds[name].append(clock() - began)
            model.zero_grad()
    result = {}
    for name, model in models.items():
        paired = [a / b for a, b in zip(seconds[name], seconds["frozen"], strict=True)]
        result[name] = {
            "seconds": min(seconds[name]),
            "x frozen": min(seconds[name]) / min(seconds["frozen"]),
            "paired": median(paired),
            **count(model, pack, case, grad),
        }
    result["fastdpo"]["differs"] = error  # from PEFT's hidden states, of their size
    return result


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [row["case"], row["implementation"], *(row.get(column) for column in COLUMNS)]
        for row in rows
    ]
    return table(["case", "layers", *COLUMNS], lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.bench_lora", __doc__, picture=False)
    parser.add_argument("--rounds", type=int, default=30, help="turns that each variant has")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(argv)
    device = default_device()
    path = options.output or RESULTS / f"lora_{device.type}.json"
    command = command_line("benchmarks.bench_lora", argv)
    facts = environment(device, command)
    try:
        results = Results(path, facts, resume=options.resume)
    except ValueError as error:
        parser.exit(2, f"bench_lora: error: {error}\n")
    budget = Budget(options.seconds)
    left_out, longest = [], 1.0
    for case in SMOKE_CASES if options.smoke else cases(device):
        if options.only not in case.name or results.has(f"{case.name} fastdpo"):
            continue
        if not budget.allows(longest):
            left_out.append(f"{case.name}: out of time")
            continue
        started = budget.spent
        for name, row in measure(case, device, options.rounds).items():
            key = f"{case.name} {name}"
            results.add(key, case=case.name, implementation=name, **row, shape=asdict(case))
        longest = max(longest, budget.spent - started)
    results.extra["left_out"] = left_out
    results.save()
    print(f"{facts['device']['name']}, commit {facts['commit']}; {command}; bar {BAR:g} x frozen")
    print(as_table(results.rows))
    for line in left_out:
        print(f"left out: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
