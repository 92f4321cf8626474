"""The loop is lean: outside model, loss and optimizer a step of the demo costs under 3 %."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
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

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, began = True, time.thread_time()
        try:
            yield
        finally:
            self.seconds[name] += time.thread_time() - began
            self._inside = False

    def watch(self, owner: object, method: str, name: str) -> None:
        plain = getattr(owner, method)

        def watched(*args, **kwargs):
            with self.span(name):
                return plain(*args, **kwargs)

        setattr(owner, method, watched)


class Clock(TrainerCallback):
    """CPU seconds from the end of the first step (which fills caches) to that of the last."""

    def __init__(self, spans: Spans):
        self.spans, self.began, self.seconds = spans, 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.began = time.thread_time()
            self.spans.seconds.clear()
        self.seconds = time.thread_time() - self.began


def demo_trainer(tmp_path: Path, clock: Clock, steps: int) -> DPOTrainer:
    options = {**OPTIONS, "output_dir": str(tmp_path / "run"), "eval_strategy": "no"}
    options |= {"max_steps": steps, "disable_tqdm": True, "use_cpu": True}
    script, model, args = cli.build_configs(options)
    assert script.dataset_name is not None
    return DPOTrainer(
        model=load_model(model, args),
        args=args,
        train_dataset=load_dataset_split(script.dataset_name, script.dataset_train_split),
        processing_class=load_tokenizer(model),
        peft_config=lora_config(model),
        callbacks=[clock],
    )


@pytest.mark.soak  # a measurement: on a busy machine it may fail for no fault of the code
def test_the_loop_costs_less_than_3_percent_of_a_step(tmp_path, monkeypatch, record_property):
    """Model: every forward of the policy and the reference, and the backward pass; loss: the
    objective; optimizer: clipping and the update. The loop is all else: packing, callbacks,
    metrics, logs (every second step here), schedule, and the guard against what is not finite."""
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others' seconds would not be seen
    spans = Spans()
    clock = Clock(spans)
    made = demo_trainer(tmp_path, clock, steps=16)
    spans.watch(made, "_score", "model")
    spans.watch(made, "_backward", "model")
    spans.watch(made.train_reference, "token_logps", "model")
    objective = type(made.objective)
    plain = objective.__call__
    monkeypatch.setattr(
        objective, "__call__", lambda *a, **k: _within(spans, "loss", plain, *a, **k)
    )
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *a, **k: _within(spans, "optimizer", clip, *a, **k),
    )
    spans.watch(made.guard, "apply", "optimizer")
    try:
        made.train()
    finally:
        torch.set_num_threads(threads)
    inside = sum(spans.seconds.values())
    share = 1 - inside / clock.seconds
    record_property("share of the loop", share)
    print(f"\nloop: {share:.2%} of {clock.seconds / 15 * 1e3:.0f} ms a step; {dict(spans.seconds)}")
    assert set(spans.seconds) == {"model", "loss", "optimizer"}
    assert 0 < share < 0.03


def _within(spans, name, function, *args, **kwargs):
    with spans.span(name):
        return function(*args, **kwargs)
