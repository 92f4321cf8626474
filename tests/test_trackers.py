"""Trackers, through transformers' callbacks: absent ones are named, a present one gets it all."""

import gc
import importlib
import importlib.util

import pytest

from fastdpo.errors import MissingPackageError
from tests.tiny import tiny_pairs
from tests.tiny_trainer import trainer

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", TRACKERS)
def test_an_absent_tracker_is_named_with_the_extra_that_installs_it(tmp_path, capsys, name):
    wanted = (name, "tensorboardX") if name == "tensorboard" else (name,)
    if any(importlib.util.find_spec(package) for package in wanted):
        pytest.skip(f"{name} is installed")
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
