"""The events of transformers' callbacks in its order; every flag that they set is obeyed."""

import json
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.tiny import tiny_pairs
from tests.tiny_trainer import trainer


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)


def spy(seen: list[tuple[str, int]]) -> TrainerCallback:
    def note(name: str) -> Any:
        def noted(self, args, state, control, **kwargs):
            assert kwargs["model"] is not None
            seen.append((name.removeprefix("on_"), state.global_step))

        return noted

    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    return type("Spy", (TrainerCallback,), {name: note(name) for name in events})()


STEP = ["step_begin", "pre_optimizer_step", "optimizer_step", "step_end"]


def test_every_event_of_a_run_in_order(tmp_path):
    seen: list[tuple[str, int]] = []
    made = trainer(
        tmp_path, callbacks=[spy(seen)], eval_dataset=tiny_pairs(4, seed=3), logging_steps=2,
        eval_strategy="epoch", save_strategy="epoch", per_device_eval_batch_size=2, max_steps=4,
    )  # fmt: skip
    made.train()
    assert [name for name, _ in seen] == [
        *("init_end", "train_begin", "epoch_begin", *STEP, *STEP, "log", *STEP, *STEP),
        *("epoch_end", "log", "prediction_step", "prediction_step", "log", "evaluate", "save"),
        *("log", "train_end"),
    ]
    assert [step for name, step in seen if name == "step_end"] == [1, 2, 3, 4]


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_a_pack_is_a_substep(tmp_path, monkeypatch, loss_type):
    """aot looks at all packs first: only the pass with gradients is made of substeps."""
    seen: list[tuple[str, int]] = []
    made = trainer(
        tmp_path, callbacks=[spy(seen)], loss_type=loss_type, max_tokens_per_pack=96, max_steps=2,
    )  # fmt: skip
    backward, done = made._backward, []

    def noted(*args: Any) -> None:
        backward(*args)
        done.append(len(seen))

    monkeypatch.setattr(made, "_backward", noted)
    made.train()
    assert made.objective.needs_whole_step == (loss_type != "sigmoid")
    after = [seen[place][0] for place in done]  # what came first after each pack's gradient
    assert after.count("pre_optimizer_step") == 2  # the last pack of a step is its end
    assert after.count("substep_end") == len(after) - 2 == made.pack_stats.n_packs - 2 > 0
    assert [name for name, _ in seen].count("substep_end") == len(after) - 2


def test_flags_that_a_callback_sets_are_obeyed(tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_log = control.should_evaluate = control.should_save = True
            control.should_training_stop = state.global_step == 3

    made = trainer(
        tmp_path, callbacks=[Asks()], eval_dataset=tiny_pairs(4, seed=3), logging_strategy="no",
        max_steps=9,
    )  # fmt: skip
    assert made.train().global_step == 3
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [("loss" in log, "eval_loss" in log, log["step"]) for log in logs] == [
        (True, False, 2),
        (False, True, 2),
        (False, False, 3),  # the run's own
    ]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
