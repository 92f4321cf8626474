"""The GPU check: GPU tests, kernels, training steps, LoRA, layers, in 9 minutes, correctness first.

`make gpu-check`, or `python3 -m benchmarks.gpu_check` from a bare checkout: nothing need be
installed but torch with CUDA, transformers, peft, accelerate, matplotlib, pytest and hypothesis;
what else is found on PYTHONPATH is used, and peers that are absent are named. Every stage is a
process with a time limit, and one that fails stops none after it. Everything is written to one
folder, $OUT or --output, while it is measured; a short table comes last. Exit status: 0 all well,
1 something failed, 2 no CUDA device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ROOT, child_environment, end_on_sigterm, stop

SECONDS = 540.0  # in all; what a stage leaves goes to those after it
GRACE = 15.0  # a stage stops by itself before its time, imports apart; then it is stopped
BROKEN = 3  # a benchmark's exit status: CUDA failed, another process may go on with --resume
TAIL = 3000  # characters of a failed stage's output that are kept


@dataclass(frozen=True)
class Stage:
    """A child process: `python -m MODULE --output FILE --seconds S`, FILE.json and perhaps .png.

    share: of the seconds that are left when it begins. folded: what it wrote ends in
    gpu_check.json, since few files are easier to carry away.
    """

    name: str
    module: str
    file: str
    share: float
    least: float = 10.0  # seconds under which it is not worth starting
    folded: bool = False


STAGES = (
    Stage("tests", "benchmarks.gpu_tests", "tests", 0.36, folded=True),
    Stage("kernels", "benchmarks.bench_linear_logps", "kernels", 0.34),
    Stage("loss", "benchmarks.bench_preference_loss", "loss", 0.10, folded=True),
    Stage("training", "benchmarks.bench_train_step", "training", 0.66, least=30.0),
    Stage("lora", "benchmarks.bench_lora", "lora", 0.4, folded=True),
    Stage("body", "benchmarks.bench_body", "body", 1.0, folded=True),
)


def run_stage(
    name: str,
    arguments: Sequence[str],
    seconds: float,
    log: Path,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `python ARGUMENTS` from the root with both packages on its path, for at most so long.

    Its output is shown and goes to `log`. Returns its status (None: stopped for time), seconds and,
    where it failed, the end of its output.
    """
    print(f"\n== {name}: python {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment or child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    lines: list[str] = []
    reader = threading.Thread(target=_echo, args=(process, lines, log), daemon=True)
    reader.start()
    try:
        process.wait(max(seconds, 1.0))
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        status = None
    finally:
        stop(process)
    reader.join(5.0)
    result = {"name": name, "status": status, "seconds": round(time.monotonic() - started, 1)}
    return result if status == 0 else result | {"output": "".join(lines)[-TAIL:]}


def _echo(process: subprocess.Popen, lines: list[str], log: Path) -> None:
    assert process.stdout is not None
    with log.open("a", encoding="utf-8") as file:
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            file.flush()
            sys.stdout.write(line)
            sys.stdout.flush()


def read(path: Path) -> dict[str, Any] | None:
    """What a stage wrote, also one that was stopped: each writes while it measures."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def stage_environment(caches: Path) -> dict[str, str]:
    """Nothing from the network, nothing written outside; kernels are compiled once for all stages.

    A cache that the environment names already is used as it is.
    """
    own = {
        "TRITON_CACHE_DIR": caches / "triton",
        "TORCHINDUCTOR_CACHE_DIR": caches / "inductor",
        "FASTDPO_CACHE_DIR": caches / "fastdpo",
        "HF_HOME": caches / "huggingface",
        "MPLCONFIGDIR": caches / "matplotlib",
    }
    named = {key: os.environ.get(key) or str(path) for key, path in own.items()}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return child_environment(**named, **quiet, **offline, PYTHONDONTWRITEBYTECODE="1")


def check(
    seconds: float,
    command: str,
    *,
    folder: Path,
    stages: Sequence[Stage] = STAGES,
    smoke: bool = False,
    run: Callable[..., dict[str, Any]] = run_stage,
) -> int:
    """Runs the stages, writes `folder`, prints the table; returns the exit status."""
    from . import harness

    folder.mkdir(parents=True, exist_ok=True)
    budget = harness.Budget(seconds)
    facts = harness.environment(harness.default_device(), command)
    document: dict[str, Any] = {"environment": facts, "stages": []}
    log, path = folder / "log.txt", folder / "gpu_check.json"
    log.write_text(f"{command}\n")
    harness.write_json(path, document)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
            environment = stage_environment(Path(caches))
            for stage in stages:
                output = folder / f"{stage.file}.json"
                output.unlink(missing_ok=True)  # of an earlier check
                share = (budget.left - GRACE) * stage.share
                if share < stage.least:
                    result = {"name": stage.name, "status": None, "seconds": 0.0}
                else:
                    arguments = ["-m", stage.module, "--output", str(output)]
                    arguments += ["--seconds", f"{share:.0f}"]
                    if smoke and stage.module != "benchmarks.gpu_tests":
                        arguments.append("--smoke")
                    result = run(stage.name, arguments, share + GRACE, log, environment)
                    while result["status"] == BROKEN and budget.left > GRACE + stage.least:
                        document["stages"].append(result)
                        arguments[arguments.index("--seconds") + 1] = f"{budget.left - GRACE:.0f}"
                        again = [*arguments, "--resume"]
                        result = run(stage.name, again, budget.left, log, environment)
                document["stages"].append(result)
                harness.write_json(path, document)
    finally:
        found = {stage.name: read(folder / f"{stage.file}.json") or {} for stage in stages}
        document["results"] = {stage.name: found[stage.name] for stage in stages if stage.folded}
        harness.write_json(path, document)
        for stage in stages:
            for kind in ("json", "png") if stage.folded else ():
                (folder / f"{stage.file}.{kind}").unlink(missing_ok=True)
        print(summary(document, found, folder), flush=True)
    return 0 if all(stage["status"] == 0 for stage in document["stages"]) else 1


def summary(document: dict[str, Any], found: dict[str, dict], folder: Path) -> str:
    """A line a stage, then kernels and trainers against TRL's, LoRA against the frozen base, and
    layers compiled and not; the rest is in the folder."""
    from . import bench_body, bench_linear_logps, bench_lora, bench_train_step, harness

    facts, tests = document["environment"], found.get("tests", {})
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    status = {0: "passed", None: "out of time"}
    stages = [
        [s["name"], status.get(s["status"], f"FAILED ({s['status']})"), s["seconds"]]
        for s in document["stages"]
    ]
    lines = [
        "",
        f"{facts['device']['name']}, commit {facts['commit']}; {versions}",
        f"absent: {', '.join(facts['absent']) or 'none'}",
        harness.table(["stage", "result", "seconds"], stages),
    ]
    if tests:
        counts = ", ".join(f"{len(tests[key])} {key.replace('_', ' ')}" for key in tests)
        lines += ["", f"GPU tests: {counts}"]
        lines += [f"  failed: {name}: {_last(text)}" for name, text in tests["failed"].items()]
        lines += [f"  not run: {name}" for name in tests["not_run"][:5]]
        reasons: dict[str, int] = {}
        for text in tests["skipped"].values():
            reasons[text] = reasons.get(text, 0) + 1
        lines += [f"  {count} skipped: {_last(reason)}" for reason, count in reasons.items()]
    for name, bench in (("kernels", bench_linear_logps), ("training", bench_train_step)):
        rows = bench.summaries(found.get(name, {}).get("rows", []))
        rows = [row for row in rows if row.get("implementation") in (None, "fastdpo", "trl")]
        lines += ["", bench.as_table(rows)] if rows else []
        lines += harness.left_out_lines(found.get(name, {}).get("left_out", []))
    training = found.get("training", {}).get("rows", [])
    if profiled := [row for row in training if "phases" in row]:
        lines += ["", bench_train_step.phases_table(profiled)]
        lines += bench_train_step.shared_lines(training)
    if adapters := found.get("lora", {}).get("rows"):
        lines += ["", bench_lora.as_table(adapters)]
    if layers := found.get("body", {}).get("rows"):
        lines += ["", bench_body.as_table(layers)]
    for name in ("lora", "body"):
        lines += harness.left_out_lines(found.get(name, {}).get("left_out", []))
    return "\n".join([*lines, f"written: {folder}"])


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E ")]
    return (errors or lines or ["?"])[0 if errors else -1].removeprefix("E ").strip()[:160]


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
    default = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--output", type=Path, default=default, help="a folder; by default $OUT")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    options = parser.parse_args(argv)
    if not options.smoke and (reason := no_cuda()):
        print(f"gpu-check: error: {reason}", file=sys.stderr)
        return 2
    end_on_sigterm()
    from .harness import command_line

    return check(
        options.seconds,
        command_line("benchmarks.gpu_check", argv),
        folder=options.output.resolve(),
        stages=[stage for stage in STAGES if stage.name in options.only],
        smoke=options.smoke,
    )


if __name__ == "__main__":
    sys.exit(main())
