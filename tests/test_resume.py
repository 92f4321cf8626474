"""Nothing is lost: a run killed at any moment, interrupted, or out of disk resumes bit for bit."""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from fastdpo.checkpoint import rotate
from fastdpo.errors import CheckpointError
from fastdpo.interrupts import Interrupted, StopRequests
from tests.kill_server import KINDS
from tests.tiny import tiny_pairs
from tests.tiny_trainer import trainer

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """The warm process of kill_server.py. A job's status: as the shell has it, or -signal."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(ROOT / "kernels/torch-ext")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kill_server"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, do: str, folder: Path, *, kill: random.Random | None = None, **job: Any) -> int:
        """Runs a job to its end, or kills it at a moment between two steps or within one."""
        folder.mkdir(exist_ok=True)
        job |= {"do": do, "folder": str(folder), "stderr": str(folder / "stderr")}
        before = steps_seen(folder)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self._line())
        if kill is not None:
            last = before + kill.randint(0, max(0, 5 - before))  # of 10: not after its end
            began = time.perf_counter()
            while steps_seen(folder) < last and time.perf_counter() - began < 60:
                time.sleep(0.002)
            time.sleep(kill.uniform(0, 0.1))  # a step, its evaluation and checkpoint take so long
            with contextlib.suppress(ProcessLookupError):  # it ended before its turn: status 0
                os.kill(pid, signal.SIGKILL)
        return int(self._line())


def steps_seen(folder: Path) -> int:
    path = folder / "packs.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.process.stdin.close()  # type: ignore[union-attr]
    assert made.process.wait(30) == 0


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> dict[str, Path]:
    """By kind: the folder of an uninterrupted run."""
    runs = {}
    for kind in KINDS:
        runs[kind] = tmp_path_factory.mktemp(kind)
        assert server.run("train", runs[kind], kind=kind) == 0, (runs[kind] / "stderr").read_text()
    return runs


TIMED = ("_per_second", "_runtime", "peak_memory")


def exact(logs: list[dict]) -> list[dict]:
    return [{k: v for k, v in log.items() if not any(t in k for t in TIMED)} for log in logs]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a: Any, b: Any) -> bool:
    """Equality bit for bit through dicts, lists and tuples of tensors, arrays and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def assert_same_run(got: Path, expected: Path) -> None:
    """Weights, optimizer, schedule, random numbers, sums, logs, and the packs of every step."""
    (weights,) = (expected / "result").glob("*.safetensors")
    assert same(load_file(got / "result" / weights.name), load_file(weights))
    names = sorted(path.name for path in (expected / "run").glob("checkpoint-*"))
    assert sorted(path.name for path in (got / "run").glob("checkpoint-*")) == names
    for name in names:
        a, b = got / "run" / name, expected / "run" / name
        files = [file.name for file in b.glob("*.pt")]
        assert len(files) >= 3
        for file in files:
            saved = [torch.load(folder / file, weights_only=False) for folder in (a, b)]
            assert same(*saved), (name, file)
        logs = [json.loads((x / "trainer_state.json").read_text())["log_history"] for x in (a, b)]
        assert exact(logs[0]) == exact(logs[1])
    assert exact(lines(got / "run/metrics.jsonl")) == exact(lines(expected / "run/metrics.jsonl"))
    packs = dict(lines(expected / "packs.jsonl"))
    assert len(packs) == 10
    seen = lines(got / "packs.jsonl")
    assert all(packs[step] == ids for step, ids in seen) and {step for step, _ in seen} == {*packs}


def killed_and_resumed(
    server: Server, folder: Path, kind: str, rng: random.Random, kills: int
) -> int:
    """Kills a run up to `kills` times at random moments, then lets it end; how often it died."""
    died = 0
    for _ in range(kills):
        status = server.run("train", folder, kind=kind, kill=rng)
        assert status in (0, -signal.SIGKILL), (folder / "stderr").read_text()
        died += status != 0
        if status == 0:
            return died
    assert server.run("train", folder, kind=kind) == 0, (folder / "stderr").read_text()
    return died


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_bit_for_bit(server, whole, tmp_path, kind):
    rng = random.Random(f"{kind} 1")
    for number in range(5):  # on a busy machine a run may end before its turn to be killed
        folder = tmp_path / str(number)
        died = killed_and_resumed(server, folder, kind, rng, kills=1)
        assert_same_run(folder, whole[kind])
        if died:
            return
    raise AssertionError("no kill hit")


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_runs_killed_at_many_random_moments_resume_bit_for_bit(server, whole, tmp_path, kind):
    """8 kills each of 3 kinds of run, up to 3 of them in one run."""
    rng = random.Random(kind)
    died = 0
    for number in range(20):
        folder = tmp_path / str(number)
        died += killed_and_resumed(server, folder, kind, rng, kills=rng.randint(1, 3))
        assert_same_run(folder, whole[kind])
        if died >= 8:
            return
    raise AssertionError(f"only {died} kills hit")


@pytest.mark.parametrize("again", [False, True], ids=["new", "over an old one"])
def test_a_kill_at_any_touch_of_the_file_system_leaves_a_whole_checkpoint(server, tmp_path, again):
    assert server.run("crash", tmp_path, again=again) == 0, (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_after_the_step_and_ends_the_run(server, whole, tmp_path, name):
    folder = tmp_path / "run"
    status = server.run("train", folder, kind="lora", signal_after=3, signal=name)
    assert status == 128 + getattr(signal, name)
    said = (folder / "stderr").read_text()
    assert f"fastdpo: {name}: saving after this step; once more stops at once" in said
    assert f"fastdpo: {name}: stopped after step 3; " in said and "'auto' goes on" in said
    assert (folder / "run" / "checkpoint-3").is_dir() and not (folder / "result").exists()
    assert server.run("train", folder, kind="lora") == 0
    assert_same_run(folder, whole["lora"])


def test_a_full_disk_leaves_the_earlier_checkpoints_whole(server, whole, tmp_path):
    """From step 4 on a file may hold 16 KiB: the model's 200 KiB do not fit, as on a full disk."""
    folder = tmp_path / "run"
    assert server.run("train", folder, kind="full", full_after=4) == 2
    said = (folder / "stderr").read_text().splitlines()
    assert [line for line in said if "fastdpo: error: checkpoint checkpoint-4 could not be" in line]
    assert "MiB left); the earlier checkpoints are whole" in said[-1]
    assert not list((folder / "run").glob(".*"))
    assert server.run("train", folder, kind="full") == 0
    assert_same_run(folder, whole["full"])


# ---- finding the newest whole one --------------------------------------------------------------


OPTIONS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def test_auto_passes_over_torn_checkpoints_and_says_so(tmp_path, caplog):
    trainer(tmp_path, **OPTIONS).train()
    run = tmp_path / "run"
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    (run / "checkpoint-9").mkdir()  # another library's
    made = trainer(tmp_path, **OPTIONS)
    with caplog.at_level(logging.INFO, "fastdpo"):
        assert made.train(resume_from_checkpoint="auto").global_step == 4
    said = " ".join(caplog.messages)
    assert "checkpoint-9' holds no fastdpo_state.json" in said
    assert "checkpoint-4' is damaged: optimizer.pt is not what was written" in said
    assert f"resumed from {run / 'checkpoint-2'}, at step 2" in said
    (run / "checkpoint-4" / "fastdpo_state.json").write_text("{}")
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(CheckpointError, match="checkpoint-4' is damaged: fastdpo_state.json"):
        trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=True)


def test_auto_begins_where_there_is_nothing_to_resume(tmp_path):
    fresh = trainer(tmp_path, resume_from_checkpoint="auto", max_steps=2)
    assert fresh.train().global_step == 2
    # A finished run without checkpoints is not begun again; one that died before its first is.
    again = trainer(tmp_path, resume_from_checkpoint="auto", max_steps=2)
    with pytest.raises(CheckpointError, match="already holds an earlier run"):
        again.train()
    (tmp_path / "run" / "curves.png").unlink()
    assert again.train().global_step == 2
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3
    with pytest.raises(CheckpointError, match="nothing to resume"):
        trainer(tmp_path / "other").train(resume_from_checkpoint=True)


def test_foreign_and_newer_checkpoints_are_named(tmp_path):
    trainer(tmp_path, **OPTIONS).train()
    folder = tmp_path / "run" / "checkpoint-4"
    with pytest.raises(CheckpointError, match="is a run, not a checkpoint; name its checkpoint-4"):
        trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=str(tmp_path / "run"))
    manifest = json.loads((folder / "fastdpo_state.json").read_text())
    newer = json.dumps(manifest | {"format": 2, "fastdpo": "9.0"})
    (folder / "fastdpo_state.json").write_text(newer)
    for asked in (True, str(folder)):  # passing over it would lose what it holds
        with pytest.raises(CheckpointError, match="has format 2, written by fastdpo 9.0; this"):
            trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=asked)
    (folder / "fastdpo_state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of fastdpo; to start from its weight"):
        trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=str(folder))


def test_rotation_keeps_what_was_just_written(tmp_path):
    """Resumed from 2 of 2, 4 (torn) with room for one: 3 must stay, though 4 is the larger."""
    for step in (2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, 1, tmp_path / "checkpoint-3", None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_early_stopping_keeps_its_patience(tmp_path):
    options = {
        **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"},
        **{"greater_is_better": True, "learning_rate": 0.0, "max_steps": 9},
    }

    def run(**more):
        patience = EarlyStoppingCallback(early_stopping_patience=4)
        made = trainer(
            tmp_path, eval_dataset=tiny_pairs(4, seed=3), callbacks=[patience], **options
        )
        return made.train(**more).global_step

    assert run() == 5  # the first counts as the best
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    assert run(resume_from_checkpoint=True) == 5


def test_a_callback_may_end_an_epoch_and_a_resume_knows(tmp_path):
    """Every epoch ends after 2 of its 4 steps; a resume goes on with the next epoch."""

    class Short(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 2 == 0

    options = {"num_train_epochs": 3, "max_steps": -1, "save_strategy": "steps", "save_steps": 2}
    made = trainer(tmp_path, callbacks=[Short], **options)
    made.train()
    epochs = [log["epoch"] for log in made.state.log_history if "loss" in log]
    assert epochs == [0.25, 0.5, 1.25, 1.5, 2.25, 2.5]
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed = trainer(tmp_path, callbacks=[Short], **options)
    resumed.train(resume_from_checkpoint=True)
    assert exact(resumed.state.log_history) == exact(made.state.log_history)


def test_the_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    with pytest.raises(Interrupted, match="SIGINT: a second one: stopped at once") as caught:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.to_obey(torch.device("cpu"), agree=False) == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.status == 130
    assert signal.getsignal(signal.SIGINT) is before
