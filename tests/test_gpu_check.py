"""The GPU check on a machine without one: it gathers, goes on, keeps to its time, and says why not.

The stages themselves are tested beside what they measure; `make soak` runs the whole chain.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_linear_logps,
    bench_train_step,
    gpu_check,
    gpu_tests,
    harness,
    train_cases,
)
from benchmarks.train_cases import Case


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_check_needs_a_gpu():
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: error: torch") and len(done.stderr.splitlines()) == 1


def fake_rows() -> dict[str, list[dict]]:
    trainer = {"case": "c", "key": "k"} | dict.fromkeys(bench_train_step.COLUMNS, 1.0)
    kernel = {"case": "head", "milliseconds": 3.0}
    return {
        "kernels": [
            {**kernel, "key": f"head {name}", "implementation": name} for name in ("fastdpo", "trl")
        ],
        "training": [
            {**trainer, "trainer": "fastdpo", "pairs_per_second": 6.0},
            {**trainer, "trainer": "trl"},
        ],
        "loss": [],
        "lora": [{"case": "8B T=8192", "implementation": "fastdpo", "seconds": 1, "x frozen": 1.1}],
        "body": [{"case": "0.5B T=2048", "variant": "graphs", "seconds": 1, "x off": 0.777}],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_gpu_check_gathers_its_stages_in_one_folder(tmp_path, capsys, monkeypatch, fails):
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    called, rows = [], fake_rows()

    def run(name, arguments, seconds, log, environment):
        called.append((name, seconds))
        output = Path(arguments[arguments.index("--output") + 1])
        if name == "tests":
            failed = {"a::two": "trace\nE   RuntimeError: no\nback"} if fails else {}
            skipped = {"a::three": "absent"}
            found = {"passed": {"a::one": 1.0}, "failed": failed, "skipped": skipped, "not_run": []}
        else:
            found = {"rows": rows[name], "left_out": [f"{name}: why"]}
        if name != "loss":  # a stage that died before it wrote anything
            output.write_text(json.dumps(found))
        return {"name": name, "status": int(fails), "seconds": 1.0}

    folder = tmp_path / "out"
    assert gpu_check.check(400.0, "make gpu-check", folder=folder, run=run) == int(fails)
    assert [name for name, _ in called] == ["tests", "kernels", "loss", "training", "lora", "body"]
    # Each may take its share of what is left, and all fit however long they take.
    assert all(seconds <= 400 for _, seconds in called) and called[0][1] < 200
    document = json.loads((folder / "gpu_check.json").read_text())
    assert document["environment"]["command"] == "make gpu-check"
    assert [stage["name"] for stage in document["stages"]] == [name for name, _ in called]
    assert document["results"]["tests"]["passed"] == {"a::one": 1.0}
    assert {path.name for path in folder.iterdir()} == {
        "gpu_check.json", "kernels.json", "log.txt", "training.json"
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "absent:" in printed and "left out, why: kernels" in printed
    assert "1 skipped: absent" in printed
    lines = {tuple(line.split()[:2]): line.split() for line in printed.splitlines()}
    assert lines["head", "fastdpo"][2] == "3.000" and lines["c", "fastdpo"][2:4] == ["6.000"] * 2
    assert ("failed: a::two: RuntimeError: no" in printed) == fails
    assert document["results"]["lora"]["rows"] == rows["lora"] and "1.100" in printed
    assert document["results"]["body"]["rows"] == rows["body"] and "0.777" in printed


def test_a_stage_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = (
        "import subprocess, sys, time; print('begun', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    log = tmp_path / "log.txt"
    stage = gpu_check.run_stage("sleep", ["-c", code], 1.0, log)
    assert stage["status"] is None and stage["seconds"] < 30 and stage["output"] == "begun\n"
    assert log.read_text() == "begun\n"
    time.sleep(max(0.0, 4 - stage["seconds"]))
    assert not mark.exists()


def test_no_stage_starts_without_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")

    def run(*args):
        raise AssertionError(args)

    assert gpu_check.check(5.0, "command", folder=tmp_path, run=run) == 1
    assert capsys.readouterr().out.count("out of time") == len(gpu_check.STAGES)


def test_a_benchmark_whose_cuda_broke_is_resumed_in_a_new_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    called = []

    def run(name, arguments, *_):
        called.append((name, "--resume" in arguments))
        broken = called == [("training", False)]
        return {"name": name, "status": gpu_check.BROKEN if broken else 0, "seconds": 1.0}

    stages = [stage for stage in gpu_check.STAGES if stage.name == "training"]
    assert gpu_check.check(400.0, "command", folder=tmp_path, stages=stages, run=run) == 1
    assert called == [("training", False), ("training", True)]
    assert gpu_check.BROKEN == harness.BROKEN

    # And it is told from an error of a trainer's own, which stops nothing.
    case = Case("tiny", "lora", "hh", 2, 2, ("fastdpo", "fastdpo-best"), max_length=64)
    errors = [ValueError("not mine"), RuntimeError("CUDA error: an illegal memory access")]

    def measure(self, trainer, seconds):
        raise errors[trainer == "fastdpo-best"]

    monkeypatch.setattr(train_cases.Bench, "measure", measure)
    results = harness.Results(tmp_path / "rows.json", {})
    with pytest.raises(harness.CudaIsBroken, match="fastdpo-best.*illegal"):
        bench_train_step.measure_all(
            [case], results, device=torch.device("cpu"), data=Path(), repeats=1,
            budget=harness.Budget(), peak_flops=1e9,
        )  # fmt: skip
    assert [row["trainer"] for row in results.rows] == ["fastdpo", "fastdpo-best"]
    assert "ValueError: not mine" in capsys.readouterr().err


@pytest.mark.parametrize(("message", "status"), [("not mine", 1), ("CUDA error: broken", 3)])
def test_a_kernel_that_fails_stops_no_other(tmp_path, monkeypatch, capsys, message, status):
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")

    def measure(self, case, which, repeats):
        if which.name == "fastdpo":
            raise RuntimeError(message)
        return {"milliseconds": 1.0}

    monkeypatch.setattr(bench_linear_logps.Bench, "measure", measure)
    path = tmp_path / "rows.json"
    arguments = ["--smoke", "--output", str(path), "--only", "frozen"]
    assert bench_linear_logps.main(arguments) == status
    assert message in capsys.readouterr().err
    document = json.loads(path.read_text())
    assert document["failed"] == ["frozen N=64 D=32 V=500 fastdpo"]
    assert bool(document["rows"]) == (status == 1)
    assert bench_linear_logps.main([*arguments, "--resume"]) == 1  # not tried again, nor forgotten
    document = json.loads(path.read_text())
    assert document["failed"] == ["frozen N=64 D=32 V=500 fastdpo"] and document["rows"]


TESTS = """
import os, time, pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert 1 == 2
def test_crash(): os._exit(3)
def test_hang(): time.sleep(100)
def test_broken(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
def test_skip(): pytest.skip("absent")
"""


def test_a_gpu_test_that_crashes_or_hangs_costs_itself_alone(tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text(TESTS)
    (tmp_path / "tests/test_b.py").write_text("import nothing_like_this  # pytest.mark.gpu")
    (tmp_path / "tests/test_c.py").write_text("import nothing_like_this")  # of no concern
    monkeypatch.setattr(gpu_tests, "TEST_SECONDS", 2.0)
    output = tmp_path / "tests.json"
    found = gpu_tests.run(tmp_path / "tests", output, 100.0, n_workers=1)
    name = "tests/test_a.py::test_{}".format
    assert list(found.passed) == [name("good"), name("after")]
    assert found.skipped == {name("skip"): "Skipped: absent"} and not found.not_run
    assert set(found.failed) == {
        "tests/test_b.py", *map(name, ("bad", "crash", "hang", "broken"))
    }  # fmt: skip
    assert "exit status 3" in found.failed[name("crash")]
    assert "still running" in found.failed[name("hang")]
    assert "nothing_like_this" in found.failed["tests/test_b.py"]
    assert json.loads(output.read_text())["failed"] == found.failed


def test_gpu_tests_out_of_time_are_named(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("import time; time.sleep(100)  # pytest.mark.gpu")
    monkeypatch.setattr(gpu_tests, "collect", lambda tests, seconds: ["tests/test_a.py::test_slow"])
    found = gpu_tests.run(tmp_path / "tests", tmp_path / "tests.json", 0.5, n_workers=2)
    assert found.not_run == ["tests/test_a.py::test_slow"] and not found.passed


def test_every_gpu_test_is_found():
    files = gpu_tests.files_with_gpu_tests(harness.ROOT / "tests")
    names = {Path(file).name for file in files}
    assert {"test_gpu.py", "test_attention.py", "test_rows.py", "test_linear_logps.py"} <= names


@pytest.mark.soak
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_whole_chain_runs_without_a_gpu(tmp_path):
    """Tiny sizes; the GPU tests skip. What a GPU alone can run is not run here."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-5000:]
    written = {path.name for path in tmp_path.iterdir()}
    results = {f"{name}.{kind}" for name in ("kernels", "training") for kind in ("json", "png")}
    assert written == results | {"gpu_check.json", "log.txt"}
    found = json.loads((tmp_path / "gpu_check.json").read_text())["results"]
    assert found["tests"]["skipped"] and not found["tests"]["not_run"] and found["loss"]["rows"]
    assert found["lora"]["rows"] and found["body"]["rows"]
