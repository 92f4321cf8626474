"""The loop is lean: outside model, loss and optimizer a step of the demo costs under 3 %."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fastdpo import cli
from fastdpo.adapters import lora_config
from fastdpo.data import load_dataset_split
from fastdpo.demo import OPTIONS
from fastdpo.model import load_model, load_tokenizer
from fastdpo.trainer import DPOTrainer


class Spans:
    """CPU seconds of this thread inside named spans; a span inside another counts for the outer
    one alone. CPU seconds: another process's load is not the loop's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def watched(self, function: Callable, name: str) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.thread_time() - began
                self._inside = False

        return watched

    def watch(self, owner: object, method: str, name: str) -> None:
        setattr(owner, method, self.watched(getattr(owner, method), name))


class Clock(TrainerCallback):
    """(CPU seconds of a step, those of its spans), from the end of one step to that of the next."""

    def __init__(self, spans: Spans):
        self.spans, self.began = spans, 0.0
        self.steps: list[tuple[float, dict[str, float]]] = []

    def on_step_end(self, args, state, control, **kwargs):
        now = time.thread_time()
        if state.global_step > 1:  # the first fills caches
            self.steps.append((now - self.began, dict(self.spans.seconds)))
        self.spans.seconds.clear()
        self.began = time.thread_time()


def demo_trainer(tmp_path: Path, clock: Clock, steps: int) -> DPOTrainer:
    options = {**OPTIONS, "output_dir": str(tmp_path / "run"), "eval_strategy": "no"}
    options |= {"max_steps": steps, "disable_tqdm": True, "use_cpu": True}
    script, model, args = cli.build_configs(options)
    assert script.dataset_name is not None
    n_rows = args.pairs_per_step * steps
    return DPOTrainer(
        model=load_model(model, args),
        args=args,
        train_dataset=load_dataset_split(script.dataset_name, f"train[:{n_rows}]"),
        processing_class=load_tokenizer(model),
        peft_config=lora_config(model),
        callbacks=[clock],
    )


def test_the_loop_costs_less_than_3_percent_of_a_step(tmp_path, monkeypatch, record_property):
    """Model: every forward of the policy and the reference, and the backward pass; loss: the
    objective; optimizer: clipping, the update, letting go of gradients. The loop is all else:
    packing, adapters off and on, callbacks, metrics, logs (every second step here), schedule, and
    the guard against what is not finite.

    A busy machine makes steps dearer, never cheaper, and small work more so than large: of the
    steps that log and of those that don't the cheapest loop and the cheapest step are taken.
    """
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others' seconds would not be seen
    spans = Spans()
    clock = Clock(spans)
    made = demo_trainer(tmp_path, clock, steps=9)
    spans.watch(made, "_score", "model")
    spans.watch(made, "_backward", "model")
    spans.watch(made.train_reference, "forward", "model")
    for owner, name, kind in (
        (type(made.objective), "__call__", "loss"),
        (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        (torch.optim.Optimizer, "zero_grad", "optimizer"),
    ):
        monkeypatch.setattr(owner, name, spans.watched(getattr(owner, name), kind))
    spans.watch(made.guard, "apply", "optimizer")
    try:
        made.train()
    finally:
        torch.set_num_threads(threads)
    assert len(clock.steps) == 8
    assert all(set(inside) == {"model", "loss", "optimizer"} for _, inside in clock.steps)
    halves = clock.steps[::2], clock.steps[1::2]  # with a log, without
    loop = sum(min(whole - sum(inside.values()) for whole, inside in half) for half in halves)
    whole = sum(min(whole for whole, _ in half) for half in halves)
    record_property("share of the loop", loop / whole)
    print(f"\nloop: {loop / whole:.2%} of {whole / 2 * 1e3:.0f} ms a step")
    assert 0 < loop / whole < 0.03
