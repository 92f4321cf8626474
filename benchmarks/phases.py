"""Where a training step's time goes: its profile summed by phase, beside each phase's least time.

Module hooks mark the forward pass; a backward operation belongs to the phase of the forward
operation it differentiates (they share autograd's sequence number). On a GPU the time is that of
kernels, on a CPU that of operators. Nothing here decides what is trained: see `peers.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from .workloads import LORA_RANK

PHASES: tuple[str, ...] = (
    "GEMMs", "attention", "shared prompts", "norms", "LoRA", "log-probs and loss", "optimizer",
    "gathers and copies", "elementwise", "idle",
)  # fmt: skip
MARK = "phase: "
ELSEWHERE = ""  # an operation that neither a mark nor a name places
# What a name tells wherever it occurs, in this order; lower case.
BY_NAME = (
    ("optimizer", ("optimizer.step", "adamw", "clip_grad", "_foreach_norm")),
    ("log-probs and loss", ("linearlogps", "linear_logps", "preferenceloss", "preference_loss",
                            "chunkedlogprob", "log_softmax", "logsigmoid")),
    ("attention", ("scaled_dot_product", "flash_attn", "flash_attention", "flashattn", "varlen",
                   "flex_attention", "efficient_attention")),
    # A frozen base's own products, and the unpacking before them.
    ("GEMMs", ("bitsandbytes::", "matmul4bit", "matmul8bit", "fp8linear", "scaled_mm")),
    ("gathers and copies", ("index_select", "embedding", "memcpy", "memset")),
)  # fmt: skip
SHARED = "gatherrows"  # keys, values, hidden rows of prompts; backward: their segment sums
# What an operator tells about itself where neither a name above nor a module does.
GEMM_OPS = ("aten::linear", "aten::matmul", "aten::mm", "aten::addmm", "aten::bmm",
            "aten::baddbmm", "aten::addmm_", "mkldnn::_linear_pointwise")  # fmt: skip
MOST_RANKS = 3 * LORA_RANK  # of siblings' adapters multiplied together; bases are wider
VIEWS = {  # or wrappers, inside which a copy is an operator of its own
    f"aten::{name}" for name in (
        "view", "_unsafe_view", "unflatten", "t", "transpose", "permute", "expand", "slice",
        "select", "split", "split_with_sizes", "narrow", "unsqueeze", "squeeze", "as_strided",
        "detach", "alias", "unbind", "chunk", "reshape", "_reshape_alias", "flatten", "contiguous",
        "to", "resolve_conj", "resolve_neg", "empty", "empty_like", "empty_strided", "new_empty",
    )
}  # fmt: skip
COPY_OPS = ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::clone", "aten::fill_")


BAR_OF_SHARED = 0.03  # of a step: what sharing prompts may cost at most


def against_least(
    seconds: dict[str, float],
    elements: dict[str, float],
    flops: dict[str, float],
    *,
    flops_per_second: float,
    bytes_per_second: float,
    element_size: int,
) -> dict[str, dict[str, float | None]]:
    """By phase: seconds, their share, and how many times the least possible they are.

    The least is a phase's necessary FLOPs at the rate of a square matmul or, where it has none,
    the elements that its operators moved at the rate of a large copy; a CPU's caches are faster.
    """
    total = sum(seconds.values())
    result: dict[str, dict[str, float | None]] = {}
    for phase, spent in seconds.items():
        least = elements.get(phase, 0.0) * element_size / bytes_per_second
        if phase in flops:
            least = flops[phase] / flops_per_second
        times = spent / least if least > 0 and spent > 0 else None
        result[phase] = {"seconds": spent, "share": spent / total, "times_least": times}
    return result


def mark(model: nn.Module) -> list[Any]:
    """Marks norms and adapters in profiles of `model`'s forward pass; returns hooks to remove."""
    hooks = []
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("Norm"):
            hooks += _range(module, "norms")
        elif hasattr(module, "lora_A"):
            hooks += _range(module, "LoRA")
            if "forward" not in vars(
                module
            ):  # fastdpo.lora leaves layers with hooks inside to PEFT
                hooks += _range(module.get_submodule("base_layer"), "GEMMs")
    return hooks


def _range(module: nn.Module, phase: str) -> list[Any]:
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(MARK + phase))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


class ProfileSteps(TrainerCallback):
    """Profiles the steps after `first` up to `last` and keeps their seconds by phase."""

    def __init__(self, device: torch.device, first: int, last: int):
        self.device, self.first, self.last = device, first, last
        self.seconds: dict[str, float] = {}
        self.elements: dict[str, float] = {}
        self.wall = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.hooks = mark(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.profile = profile(
                activities=[ProfilerActivity.CPU, *cuda], record_shapes=True, acc_events=True
            )
            _wait(self.device)
            self.profile.__enter__()
        if state.global_step == self.last:
            _wait(self.device)
            self.profile.__exit__(None, None, None)
            for hook in self.hooks:
                hook.remove()
            self._sum()

    def _sum(self) -> None:
        events = list(self.profile.events() or ())
        cuda = self.device.type == "cuda"
        self.wall = (
            max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
        ) / 1e6
        self.seconds, self.elements = by_phase(events, cuda=cuda)
        self.seconds["idle"] = max(self.wall - sum(self.seconds.values()), 0.0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_phase(events: Iterable[Any], *, cuda: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds, and the least elements moved, by phase.

    An operator moves at least its inputs and an output as large as the largest of them; what it
    calls moves nothing more, and views move nothing.
    """
    events = [e for e in events if str(e.device_type).endswith("CPU")]
    forward = _forward_phases(events)
    seconds = dict.fromkeys(PHASES, 0.0)
    elements = dict.fromkeys(PHASES, 0.0)
    for event in events:
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time <= 0 or (not cuda and _waits(event.name)):
            continue
        phase = _phase(event, forward)
        if phase == "LoRA" and _is_base_product(event):
            phase = "GEMMs"
        seconds[phase] += time / 1e6
        if _moves(event, cuda=cuda):
            sizes = _sizes(event)
            elements[phase] += sum(sizes) + max(sizes)
    return seconds, elements


def _moves(event: Any, *, cuda: bool) -> bool:
    """Whether an event's inputs are counted as moved: those of the outermost operator that has
    work of its own, or of a function of ours that launches a kernel itself."""

    def works(one: Any) -> bool:
        return one.name not in VIEWS and (not cuda or one.self_device_time_total > 0)

    if not (works(event) and any(_sizes(event)) and ("::" in event.name or cuda)):
        return False
    outer = (e for e in _chain(event.cpu_parent) if "::" in e.name and not _waits(e.name))
    return not any(works(e) and any(_sizes(e)) for e in outer)


def _sizes(event: Any) -> list[int]:
    """Elements of each input; lists of tensors may have none that are known."""
    return [_count(shape) for shape in event.input_shapes or ()]


def _forward_phases(events: list[Any]) -> dict[int, str]:
    """By autograd's sequence number: the phase of the operation that a gradient belongs to."""
    found: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and "Backward" not in event.name:
            found.setdefault(event.sequence_nr, _named(event) or ELSEWHERE)
    return found


def _phase(event: Any, forward: dict[int, str]) -> str:
    named = _named(event)
    if named is not None:
        return named
    for ancestor in _chain(event):
        if ancestor.name.startswith("autograd::engine::evaluate_function"):
            phase = forward.get(ancestor.sequence_nr, ELSEWHERE)
            return _own(event) if phase == ELSEWHERE else phase
    return _own(event)


def _named(event: Any) -> str | None:
    """The phase of the innermost mark or telling name around an event."""
    if any(SHARED in ancestor.name.lower() for ancestor in _chain(event)):
        return "shared prompts"  # whose innermost names are those of any gather
    for ancestor in _chain(event):
        if ancestor.name.startswith(MARK):
            return ancestor.name.removeprefix(MARK)
        lower = ancestor.name.lower()
        for phase, parts in BY_NAME:
            if any(part in lower for part in parts):
                return phase
    return None


def _is_base_product(event: Any) -> bool:
    """Whether a product inside a LoRA layer is its base's: neither operand has the rank's width."""
    product = next((e for e in _chain(event) if e.name in GEMM_OPS), None)
    if product is None:
        return False
    matrices = [shape for shape in product.input_shapes or () if len(shape) == 2]
    return bool(matrices) and min(min(shape) for shape in matrices) > MOST_RANKS


def _own(event: Any) -> str:
    names = {ancestor.name for ancestor in _chain(event)}
    if names.intersection(GEMM_OPS):
        return "GEMMs"
    return "gathers and copies" if names.intersection(COPY_OPS) else "elementwise"


def _chain(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _waits(name: str) -> bool:
    """Whether a CPU event holds other work rather than doing any: a mark, a step, the engine."""
    return name.startswith((MARK, "autograd::engine", "Optimizer.", "ProfilerStep"))


def _count(shape: Any) -> int:
    """Elements of one input; of a list of tensors, of all of them."""
    if not shape:
        return 0
    if isinstance(shape[0], (list, tuple)):
        return sum(map(_count, shape))
    count = 1
    for size in shape:
        count *= size
    return count
