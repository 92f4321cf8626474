"""Runs the tests marked `gpu` in several processes: one that crashes or hangs costs itself alone.

`python -m benchmarks.gpu_tests`. Tests are dealt out to a few processes, which compile kernels side
by side. A process that dies, hangs in a test or has broken its CUDA context is replaced by one that
goes on with the rest. Exit status: 0 all passed or skipped, 1 otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import ROOT, child_environment, end_on_sigterm, stop

TEST_SECONDS = 100.0  # for one test; the first of a kind compiles
START_SECONDS = 150.0  # for imports and collection
MARK = "pytest.mark.gpu"


@dataclass
class Outcome:
    """What became of every test; `failed` has the end of each report, `skipped` the reason."""

    passed: dict[str, float] = field(default_factory=dict)  # seconds
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    def has(self, test: str) -> bool:
        return test in self.passed or test in self.failed or test in self.skipped


def files_with_gpu_tests(folder: Path) -> list[str]:
    """Test files that mention the mark; others may need packages that are absent here."""
    found = sorted(folder.rglob("test_*.py"))
    return [str(path) for path in found if MARK in path.read_text(encoding="utf-8")]


def collect(folder: Path, seconds: float) -> list[str]:
    """The ids of the tests marked `gpu`; of a file that can't be imported, its own name."""
    root = folder.parent
    files = [str(Path(path).relative_to(root)) for path in files_with_gpu_tests(folder)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q",
               "--continue-on-collection-errors", "-p", "no:cacheprovider", *files]  # fmt: skip
    done = subprocess.run(
        command, cwd=root, env=child_environment(), capture_output=True, text=True, timeout=seconds
    )
    lines = done.stdout.splitlines()
    tests = [line for line in lines if "::" in line and line.split("::")[0] in files]
    broken = [name for name in files if any(line.startswith(f"ERROR {name}") for line in lines)]
    if not tests and not broken:
        raise RuntimeError(f"no test marked gpu was found: {(done.stdout + done.stderr)[-2000:]}")
    return [*broken, *tests]


class Worker:
    """A share of the tests, run by one pytest process after the other until none is left."""

    def __init__(self, tests: Sequence[str], root: Path, folder: Path, outcome: Outcome):
        self.tests, self.root, self.folder, self.outcome = list(tests), root, folder, outcome
        self.process: subprocess.Popen | None = None
        self.rounds = 0

    @property
    def left(self) -> list[str]:
        return [test for test in self.tests if not self.outcome.has(test)]

    def step(self) -> bool:
        """Looks after the process; whether anything is left to do."""
        if self.process is None:
            if not self.left:
                return False
            self._start()
            return True
        ended = self.process.poll()
        running, since = self._read()
        if ended is None:
            limit = TEST_SECONDS if running else START_SECONDS
            if time.monotonic() - since > limit:
                stop(self.process)
                self._blame(running, f"still running after {limit:.0f} s")
        else:
            self.process = None
            if running:
                self._blame(running, f"the process died in it, exit status {ended}")
            elif self.left == self.before:  # nothing came of it: don't try for ever
                self._blame(self.left[0], f"pytest ended with {ended}: {self._tail()}")
        return True

    def _start(self) -> None:
        self.rounds += 1
        self.before = self.left
        self.lines = self.folder / f"{id(self)}.{self.rounds}.jsonl"
        self.log = self.lines.with_suffix(".log")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short",
                   "--continue-on-collection-errors", "-p", "no:cacheprovider",
                   "-p", "benchmarks.pytest_lines", *self.left]  # fmt: skip
        threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        environment = child_environment(PYTEST_LINES=str(self.lines), **threads)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.root, env=environment, process_group=0,
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.seen, self.changed = 0, time.monotonic()

    def _read(self) -> tuple[str | None, float]:
        """Takes in the events so far: the running test, and when the last event came."""
        text = self.lines.read_text(encoding="utf-8") if self.lines.exists() else ""
        events = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        if len(events) > self.seen:
            self.seen, self.changed = len(events), time.monotonic()
        running = None
        for event in events:
            kind, test = event["event"], event["test"]
            if kind in ("start", "end"):
                running = test if kind == "start" else None
            elif kind == "passed":
                self.outcome.passed.setdefault(test, event["seconds"])
            elif kind == "failed":  # perhaps in its teardown, after it had passed
                self.outcome.passed.pop(test, None)
                self.outcome.failed[test] = event["text"]
            else:
                self.outcome.skipped[test] = event["text"]
        return running, self.changed

    def _blame(self, test: str | None, why: str) -> None:
        test = test or self.left[0]
        self.outcome.passed.pop(test, None)
        self.outcome.failed[test] = why
        self.process = None

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]

    def close(self) -> None:
        if self.process is not None:
            self._read()
            stop(self.process)


def run(tests: Path, output: Path, seconds: float, n_workers: int) -> Outcome:
    """Runs every test marked `gpu` under `tests` for at most so long.

    What is known goes to `output` every few seconds, so that it stays when this is killed.
    """
    started = told = time.monotonic()
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        try:
            names = collect(tests, max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            names = files_with_gpu_tests(tests)
        workers = [
            Worker(names[i::n_workers], tests.parent, Path(folder), outcome)
            for i in range(n_workers)
        ]
        try:
            while any([worker.step() for worker in workers]):
                now = time.monotonic()
                if now - started > seconds:
                    break
                if now - told > 3:
                    told = now
                    _write(output, workers, outcome)
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.close()
            _write(output, workers, outcome)
    return outcome


def _write(output: Path, workers: Sequence[Worker], outcome: Outcome) -> None:
    outcome.not_run = [test for worker in workers for test in worker.left]
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    partial.replace(output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON: what became of each test")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all of them together")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="folder of the tests")
    parser.add_argument("--workers", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    options = parser.parse_args(argv)
    end_on_sigterm()
    found = run(options.tests.resolve(), options.output, options.seconds, options.workers)
    slowest = sorted(found.passed.items(), key=lambda item: -item[1])[:3]
    print(
        f"{len(found.passed)} passed, {len(found.failed)} failed, {len(found.skipped)} skipped, "
        f"{len(found.not_run)} not run; slowest: "
        + ", ".join(f"{test.split('::')[-1]} {seconds:.0f} s" for test, seconds in slowest)
    )
    for test, text in found.failed.items():
        print(f"\nFAILED {test}\n{text}")
    return 1 if found.failed or found.not_run else 0


if __name__ == "__main__":
    sys.exit(main())
