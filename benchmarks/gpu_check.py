"""The GPU check: GPU tests, the kernel benchmark and the training-step benchmark, in 8 minutes.

`make gpu-check`, or `python3 -m benchmarks.gpu_check` from a bare checkout: nothing need be
installed but torch with CUDA, transformers, peft, pytest and hypothesis; what else is found on
PYTHONPATH is used, and peers that are absent are named. Writes one JSON file and ends with a short
table. Exit status: 0 all well, 1 something failed, 2 no CUDA device.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ROOT, child_environment

SECONDS = 470.0  # in all; the shares below leave what a stage does not use to the next
TEST_SECONDS, KERNEL_SECONDS = 150.0, 130.0
GRACE = 25.0  # a benchmark stops by itself before its time, imports apart; then it is stopped


@dataclass(frozen=True)
class Stage:
    """What one child process came to: its exit status (None: stopped for time) and seconds."""

    name: str
    status: int | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == 0


def run_stage(name: str, arguments: Sequence[str], seconds: float) -> Stage:
    """Runs `python ARGUMENTS` from the root with both packages on its path, for at most so long."""
    environment = child_environment(
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore"
    )
    print(f"\n== {name}: python {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            timeout=max(seconds, 1.0),
            check=False,
        )
        status = done.returncode
    except subprocess.TimeoutExpired:
        status = None
    return Stage(name, status, round(time.monotonic() - started, 1))


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a pytest run, and the names of what did not pass."""
    if not path.exists():
        return {"passed": 0, "failed": [], "skipped": []}
    failed, skipped, passed = [], [], 0
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            skipped.append(f"{name}: {skip.get('message')}")
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def read_results(path: Path) -> dict[str, Any] | None:
    """What a benchmark wrote, also one that was stopped: it writes after every row."""
    return json.loads(path.read_text()) if path.exists() else None


def check(seconds: float, output: Path, command: str) -> int:
    """Runs the three stages, writes `output`, prints the table; returns the exit status."""
    from . import harness

    budget = harness.Budget(seconds)
    device = harness.default_device()
    facts = harness.environment(device, command)
    document: dict[str, Any] = {"environment": facts}
    with tempfile.TemporaryDirectory() as folder:
        junit, kernels, training = (Path(folder) / name for name in ("t.xml", "k.json", "s.json"))
        stages = [
            run_stage(
                "GPU tests",
                ["-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider",
                 f"--junitxml={junit}"],
                min(TEST_SECONDS, budget.left),
            )
        ]  # fmt: skip
        document["tests"] = read_junit(junit)
        for name, module, path, limit in (
            ("kernels", "benchmarks.bench_linear_logps", kernels, KERNEL_SECONDS),
            ("training step", "benchmarks.bench_train_step", training, float("inf")),
        ):
            share = max(min(limit, budget.left - GRACE), 0.0)
            arguments = ["-m", module, "--seconds", f"{share:.0f}", "--output", str(path)]
            stages.append(run_stage(name, arguments, share + GRACE))
            document[name.replace(" ", "_")] = read_results(path)
    document["stages"] = [vars(stage) for stage in stages]
    harness.write_json(output, document)
    print(summary(document, harness.table, output))
    passed = all(stage.passed for stage in stages) and not document["tests"]["failed"]
    return 0 if passed else 1


def summary(document: dict[str, Any], table: Any, output: Path) -> str:
    """A line a stage, then kernels and trainers against TRL's; the rest is in the file."""
    facts, tests = document["environment"], document["tests"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    stages = [
        [s["name"], {0: "passed", None: "out of time"}.get(s["status"], "FAILED"), s["seconds"]]
        for s in document["stages"]
    ]
    lines = [
        "",
        f"{facts['device']['name']}, commit {facts['commit']}; {versions}",
        f"absent: {', '.join(facts['absent']) or 'none'}",
        f"GPU tests: {tests['passed']} passed, {len(tests['failed'])} failed, "
        f"{len(tests['skipped'])} skipped",
        *(f"  failed: {name}" for name in tests["failed"]),
        *(f"  skipped: {name}" for name in tests["skipped"]),
        table(["stage", "result", "seconds"], stages),
    ]
    from . import bench_linear_logps, bench_train_step, harness

    for name, bench in (("kernels", bench_linear_logps), ("training_step", bench_train_step)):
        found = document[name] or {}
        rows = bench.summaries(found.get("rows", []))
        rows = [row for row in rows if row.get("implementation") in (None, "fastdpo", "trl")]
        lines += ["", bench.as_table(rows)] if rows else []
        lines += harness.left_out_lines(found.get("left_out", []))
    return "\n".join([*lines, f"written: {output}"])


def no_cuda() -> str | None:
    """Why this machine can't be checked, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; call it with a Python whose torch has CUDA"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no CUDA device here; run it on a machine with an "
            "NVIDIA GPU (the CPU benchmark is python -m benchmarks.bench_train_step)"
        )
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_check.json"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    options = parser.parse_args(argv)
    if reason := no_cuda():
        print(f"gpu-check: error: {reason}", file=sys.stderr)
        return 2
    from .harness import command_line

    command = command_line("benchmarks.gpu_check", argv)
    return check(options.seconds, options.output.resolve(), command)


if __name__ == "__main__":
    sys.exit(main())
