"""The phases of a profile: every second is in one, and what sharing prompts costs is in its own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks import bench_train_step, phases
from fastdpo.lora import use_lean_lora
from fastdpo.rows import RowGather, gather_rows
from tests.tiny import tiny_llama

WIDTH, ROWS = 64, 300
INDEX = [*range(ROWS), *range(100)]  # a third of the rows twice


def profiled(run) -> tuple[list[Any], dict[str, float], dict[str, float]]:
    """The events of `run`, and their seconds and elements by phase."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as recorded:
        run()
    events = list(recorded.events() or ())
    return events, *phases.by_phase(events, cuda=False)


def step(recompute: bool = False, gather: bool = True):
    """A product, a gather of rows that repeat and what is done with them; forward and backward."""
    torch.manual_seed(0)
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)
    plan = RowGather.plan(torch.tensor(INDEX).numpy(), ROWS)

    def inner(x: torch.Tensor) -> torch.Tensor:
        rows = x @ weight
        return (gather_rows(rows, plan) if gather else rows).sin()

    def run() -> None:
        out = checkpoint(inner, x, use_reentrant=False) if recompute else inner(x)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()

    return run


def test_every_second_is_in_one_phase() -> None:
    events, seconds, _ = profiled(step())
    work = [e for e in events if not phases._waits(e.name)]
    total = sum(e.self_cpu_time_total for e in work) / 1e6
    assert sum(seconds.values()) == pytest.approx(total, rel=1e-9)
    assert seconds["GEMMs"] > 0 and seconds["elementwise"] > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gather_and_its_backward_are_the_phase_of_shared_prompts(recompute: bool) -> None:
    events, seconds, _ = profiled(step(recompute))
    inside = [e for e in events if any("GatherRows" in a.name for a in phases._chain(e))]
    inside = [e for e in inside if not phases._waits(e.name)]
    names = {e.name for e in inside}
    # Forward: one index_select, again where the forward is computed again. Backward, of rows that
    # occur at most twice: the first places' rows, and the second ones added to them.
    assert {"_GatherRows", "_GatherRowsBackward", "aten::add", "aten::index_copy_"} <= names
    n_forward = sum(e.name == "_GatherRows" for e in inside)
    assert n_forward == 1 + recompute
    assert sum(e.name == "aten::index_select" for e in inside) == n_forward + 3
    expected = sum(e.self_cpu_time_total for e in inside) / 1e6
    assert seconds["shared prompts"] == pytest.approx(expected, rel=1e-9) and expected > 0
    assert profiled(step(recompute, gather=False))[1]["shared prompts"] == 0


def test_what_is_moved_is_counted_once_and_views_not_at_all() -> None:
    x, index = torch.randn(ROWS, WIDTH), torch.tensor(INDEX)

    def run() -> None:
        x.t().reshape(WIDTH, ROWS).t()  # views
        x.index_select(0, index)
        torch.nn.functional.linear(x, x)  # calls matmul, which calls mm, of the same operands

    _, _, elements = profiled(run)
    n = ROWS * WIDTH
    assert elements["gathers and copies"] == n + len(INDEX) + n
    assert elements["GEMMs"] == n + n + n
    assert elements["elementwise"] == 0


def test_marks_leave_lean_layers_lean(caplog) -> None:
    model: Any = get_peft_model(
        tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    ids = torch.arange(8)[None]
    for lean in (False, True):
        if lean:
            use_lean_lora(model)
        hooks = phases.mark(model)
        events, seconds, _ = profiled(lambda: model(input_ids=ids).logits.sum().backward())
        for hook in hooks:
            hook.remove()
        assert any("LeanProducts" in e.name for e in events) == lean
        assert min(seconds["LoRA"], seconds["GEMMs"], seconds["norms"]) > 0
    assert "PEFT's own forward" not in caplog.text
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_kernel_of_our_own_counts_what_it_is_given() -> None:
    """On a GPU the segment sum is no operator of torch's: its launch belongs to the function."""

    class Event:
        device_type, sequence_nr, self_cpu_time_total = "DeviceType.CPU", -1, 1.0

        def __init__(self, name: str, device: float, shapes=(), parent=None):
            self.name, self.cpu_parent = name, parent
            self.self_device_time_total, self.input_shapes = device, shapes

    engine = Event("autograd::engine::evaluate_function: _GatherRowsBackward", 0.0)
    ours = Event("_GatherRowsBackward", 30.0, [[400, 64]], engine)
    empty = Event("aten::new_empty", 0.0, [[400, 64], []], ours)
    linear = Event("aten::linear", 0.0, [[300, 64], [64, 64]])
    product = Event("aten::mm", 50.0, [[300, 64], [64, 64]], linear)
    seconds, elements = phases.by_phase([engine, ours, empty, linear, product], cuda=True)
    assert seconds["shared prompts"] == 30e-6 and elements["shared prompts"] == 2 * 400 * 64
    assert seconds["GEMMs"] == 50e-6 and elements["GEMMs"] == 2 * 300 * 64 + 64 * 64


def test_the_share_is_that_of_the_profiled_and_of_the_timed_step() -> None:
    found = {"shared prompts": {"seconds": 0.02, "share": 0.01}}
    rows: list[dict[str, Any]] = [
        {"case": "a", "trainer": "fastdpo", "phases": found, "pairs": 8},
        {"case": "a", "trainer": "trl", "phases": {}, "pairs": 8},
        {"case": "a", "trainer": "fastdpo", "seconds_per_pair": 0.2},
        {"case": "a", "trainer": "fastdpo-compiled", "seconds_per_pair": 0.125},
        {"case": "a", "trainer": "fastdpo-best", "seconds_per_pair": 0.01},  # of fewer passes
        {"case": "a", "trainer": "trl", "seconds_per_pair": 0.01},
        {"case": "b", "trainer": "fastdpo", "seconds_per_pair": 0.01},
        {"case": "c", "trainer": "fastdpo", "phases": found, "pairs": 8},
        {"case": "d", "trainer": "fastdpo", "error": "out of memory"},
    ]
    shares = bench_train_step.shared_prompts(rows)
    assert [(s["case"], s["share"], s["of_timed"]) for s in shares] == [
        ("a", 0.01, pytest.approx(0.02)),
        ("c", 0.01, None),
    ]
    assert bench_train_step.shared_lines(rows) == [
        "a: sharing prompts takes 1.00% of the profiled step, 2.00% of the timed one; "
        "the bar is 3%",
        "c: sharing prompts takes 1.00% of the profiled step; the bar is 3%",
    ]


def test_only_norms_and_adapters_are_marked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    hooks = phases.mark(model)
    assert len(hooks) == 2
    _, seconds, _ = profiled(lambda: model(torch.randn(8, 4)))
    assert seconds["norms"] > 0 and seconds["LoRA"] == 0
