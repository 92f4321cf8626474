"""Trackers, through accelerate's: absent ones are named, present ones get options and every number.

The packages are stand-ins with what accelerate calls of them, beside the real tensorboard where it
is installed.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import LoggerType
from transformers import TrainerCallback
from transformers.integrations.integration_utils import WandbCallback

from fastdpo import DPOConfig
from fastdpo.errors import ConfigError, MissingPackageError
from fastdpo.interrupts import Interrupted
from tests.tiny import tiny_pairs
from tests.tiny_trainer import trainer

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", TRACKERS)
def test_an_absent_tracker_is_named_with_the_extra_that_installs_it(
    tmp_path, capsys, monkeypatch, name
):
    wanted = (name, "tensorboardX") if name == "tensorboard" else (name,)
    if any(importlib.util.find_spec(package) for package in wanted):
        pytest.skip(f"{name} is installed")
    # Handlers that other tests left behind write to streams that are closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with pytest.raises(
        MissingPackageError, match=rf"(?s){name}.*pip install 'fastdpo\[trackers\]'"
    ):
        trainer(tmp_path, report_to=name)
    gc.collect()  # the half-made callback of one that is absent has nothing to say of its own
    assert "Traceback" not in capsys.readouterr().err


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra fastdpo[trackers] is not installed")
    accumulator = "tensorboard.backend.event_processing.event_accumulator"

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    made = trainer(
        tmp_path,
        report_to="tensorboard",
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset={"near": tiny_pairs(4, seed=3), "far": tiny_pairs(4, seed=4)},
    )
    made.train()
    events = importlib.import_module(accumulator).EventAccumulator(
        str(next((tmp_path / "events").rglob("events*")).parent)
    )
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/rewards/margins", "train/waste", "eval/near_loss"} <= names
    logged = [log["loss"] for log in made.state.log_history if "loss" in log]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)


# ---- stand-ins ----------------------------------------------------------------------------------


class Seen:
    """What one stand-in was told. numbers: {name: {step: value}}."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.numbers: dict[str, dict[int, float]] = {}
        self.n_open = 0

    def start(self, **kwargs: Any) -> None:
        self.inits.append(kwargs)
        self.n_open += 1

    def finish(self, *_: Any) -> None:
        self.n_open -= 1

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.numbers.setdefault(name, {})[step] = value


def module(name: str, **content: Any) -> Any:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


def wandb_like(name: str, seen: Seen) -> Any:
    def init(project: str, **kwargs: Any) -> Any:
        seen.start(project=project, **kwargs)
        return SimpleNamespace(id="id7", name="name7", log=seen.log, finish=seen.finish)

    def update(values: dict[str, Any], allow_val_change: bool) -> None:
        seen.options |= values

    return module(name, init=init, config=SimpleNamespace(update=update), __version__="99")


def mlflow_like(seen: Seen) -> Any:
    def start_run(**kwargs: Any) -> Any:
        seen.start(**kwargs)
        return SimpleNamespace(info=SimpleNamespace(run_id="run7"))

    def log_params(values: dict[str, Any]) -> None:
        assert len(values) <= 100
        seen.options |= values

    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    return module(
        "mlflow",
        search_experiments=lambda filter_string: [],
        create_experiment=lambda name, artifact_location, tags: name,
        start_run=start_run,
        log_params=log_params,
        log_metrics=seen.log,
        end_run=seen.finish,
        utils=SimpleNamespace(validation=limits),
    )


def tensorboard_like(seen: Seen) -> Any:
    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int):
            seen.start(log_dir=log_dir, purge_step=purge_step)

        def add_hparams(self, values: dict[str, Any], metric_dict: dict) -> None:
            assert all(isinstance(v, bool | int | float | str | None) for v in values.values())
            seen.options |= values

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            seen.log({name: value}, global_step)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            seen.finish()

    return module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)


@pytest.fixture
def seen(monkeypatch) -> dict[str, Seen]:
    """The four stand-ins, as if they were installed."""
    found = {name: Seen() for name in TRACKERS}
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, wandb_like(name, found[name]))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow_like(found["mlflow"]))
    board = tensorboard_like(found["tensorboard"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    installed = [LoggerType(name) for name in TRACKERS]
    monkeypatch.setattr("accelerate.tracking._available_trackers", installed)
    for name in [
        key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_", "TENSORBOARD_"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)
    return found


def expected(history: list[dict]) -> dict[str, dict[int, float]]:
    """state.log_history as it should arrive."""
    numbers: dict[str, dict[int, float]] = {}
    for log in history:
        for name, value in log.items():
            if name != "step":
                name = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                numbers.setdefault(name, {})[log["step"]] = value
    return numbers


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("report_to", ["all", list(TRACKERS), "wandb"])
def test_options_and_every_number_with_its_step_arrive(tmp_path, seen, report_to):
    made = trainer(
        tmp_path, report_to=report_to, eval_dataset={"far": tiny_pairs(4, seed=4)}, **EVALUATED
    )
    made.train()
    wanted = expected(made.state.log_history)
    assert set(wanted["train/loss"]) == {1, 2, 3, 4} and set(wanted["eval/far_loss"]) == {2, 4}
    names = TRACKERS if report_to != "wandb" else ("wandb",)
    for name in names:
        assert seen[name].numbers == wanted, name
        assert seen[name].options["learning_rate"] == 1e-2, name
        assert seen[name].options["loss_type"] == '["sigmoid"]', name
        assert len(seen[name].inits) == 1, name
    assert all(not seen[name].inits for name in set(TRACKERS) - set(names))
    assert [seen[name].n_open for name in ("tensorboard", "wandb", "trackio")] == [0, 0, 0]


def test_none_starts_nothing_and_a_tracker_changes_nothing(tmp_path, seen):
    plain = trainer(tmp_path / "plain", report_to="none")
    plain.train()
    assert not any(of.inits for of in seen.values())
    tracked = trainer(tmp_path / "tracked", report_to="wandb")
    tracked.train()
    losses = [[log.get("loss") for log in of.state.log_history] for of in (plain, tracked)]
    assert losses[0] == losses[1]


def test_project_run_name_and_folder_are_as_asked(tmp_path, seen, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from the shell")
    made = trainer(tmp_path, report_to="all", max_steps=1, run_name="mine", trackio_space_id="me/s")
    made.train()
    assert seen["wandb"].inits == [{"project": "from the shell", "name": "mine"}]
    assert seen["trackio"].inits[0]["space_id"] == "me/s"
    assert seen["mlflow"].inits[0]["run_name"] == "mine"
    folder = tmp_path / "run" / "runs" / "from the shell"
    assert seen["tensorboard"].inits == [{"log_dir": str(folder), "purge_step": 0}]
    trainer(tmp_path / "b", report_to="wandb", max_steps=1, project="asked").train()
    assert seen["wandb"].inits[1] == {"project": "asked"}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_is_ended_and_a_resumed_one_continues_it(tmp_path, seen):
    with pytest.raises(Interrupted):
        trainer(tmp_path, report_to="all", callbacks=[Stop()]).train()
    assert [seen[name].n_open for name in ("tensorboard", "wandb", "trackio")] == [0, 0, 0]
    for of in seen.values():
        of.options.clear()
    made = trainer(tmp_path, report_to="all")
    made.train(resume_from_checkpoint="auto")
    assert seen["wandb"].inits[1]["id"] == "id7" and seen["wandb"].inits[1]["resume"] == "allow"
    assert seen["trackio"].inits[1]["name"] == "name7"
    assert seen["mlflow"].inits[1]["run_id"] == "run7"
    assert seen["tensorboard"].inits[1]["purge_step"] == 3
    assert not any(of.options for of in seen.values())  # mlflow refuses an option's second value
    assert seen["mlflow"].numbers == expected(made.state.log_history)


def test_evaluating_outside_training_reaches_the_same_run(tmp_path, seen):
    made = trainer(tmp_path, report_to="wandb", max_steps=2, eval_dataset=tiny_pairs(4, seed=3))
    made.train()
    made.evaluate()
    assert set(seen["wandb"].numbers["eval/loss"]) == {2}
    assert seen["wandb"].inits[1]["id"] == "id7" and seen["wandb"].n_open == 0


def test_an_error_in_training_ends_the_run(tmp_path, seen):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("of the user's")

    with pytest.raises(RuntimeError, match="of the user's"):
        trainer(tmp_path, report_to="wandb", callbacks=[Fails()]).train()
    assert len(seen["wandb"].inits) == 1 and seen["wandb"].n_open == 0


def test_an_unknown_tracker_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"'neptune'.*wandb.*DPOTrainer\(callbacks="):
        DPOConfig(output_dir="unused", use_cpu=True, report_to=["neptune"])


def test_transformers_own_callback_can_be_passed(tmp_path, monkeypatch):
    told: list[dict] = []
    monkeypatch.setattr(WandbCallback, "__init__", lambda self: None)
    monkeypatch.setattr(WandbCallback, "on_train_begin", lambda *args, **kwargs: None)
    monkeypatch.setattr(WandbCallback, "on_train_end", lambda *args, **kwargs: None)
    monkeypatch.setattr(WandbCallback, "on_save", lambda *args, **kwargs: None)
    monkeypatch.setattr(WandbCallback, "on_predict", lambda *args, **kwargs: None, raising=False)
    monkeypatch.setattr(
        WandbCallback, "on_log", lambda self, a, s, c, logs=None, **kwargs: told.append(logs or {})
    )
    made = trainer(tmp_path, max_steps=1, callbacks=[WandbCallback()])
    made.train()
    assert "loss" in told[0]
