"""What every benchmark shares: where it ran, a time budget, resumable results, a table.

A result is only worth keeping with the device, versions, commit and command that gave it, so
`Results` writes them first and each row as soon as it is measured. No model or kernel here.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import ROOT

PACKAGES = (
    "torch", "triton", "transformers", "peft", "datasets", "accelerate", "trl", "liger_kernel",
    "cut_cross_entropy", "quack", "flash_attn", "bitsandbytes", "unsloth",
)  # fmt: skip
# Where the name of the distribution is not the name of the import.
DISTRIBUTIONS = {
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
    "flash_attn": "flash-attn",
}


NOT_FINITE = {str(number): number for number in (math.nan, math.inf, -math.inf)}  # in files
BROKEN = 3  # exit status: CUDA failed in this process; --resume goes on behind what broke it


class CudaIsBroken(RuntimeError):
    """An illegal access or the like: whatever this process tries on the GPU now fails too."""


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> dict[str, str | None]:
    """Version by package; None for one that can't be imported."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:  # a bare checkout on the path
        return "unknown"


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name and what bounds the speed: for a GPU its memory, on a CPU the threads torch uses."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {"name": _cpu_name(), "torch_threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with `-dirty` where tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def arguments(module: str, about: str | None, *, picture: bool = True) -> argparse.ArgumentParser:
    """A program's parser with what every program of rows takes: where, how long, and going on."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    beside = "; a PNG of the same name beside it" if picture else ""
    parser.add_argument("--output", type=Path, help=f"JSON{beside}")
    parser.add_argument("--seconds", type=float, help="start nothing that won't end within these")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in --output")
    return parser


def command_line(module: str, argv: Sequence[str] | None = None) -> str:
    """The command that repeats this run: `python -m benchmarks.NAME …`."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Everything a figure has to be quoted with."""
    found = versions()
    return {
        "command": command,
        "commit": commit(),
        "device": device_facts(device),
        "python": platform.python_version(),
        "versions": {name: version for name, version in found.items() if version},
        "absent": [name for name, version in found.items() if version is None],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@dataclass
class Budget:
    """Seconds that a program may use; None: as long as it takes."""

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - self.spent

    def allows(self, seconds: float) -> bool:
        """Whether something that takes about `seconds` still fits."""
        return self.left >= seconds


class Results:
    """Rows of a benchmark in one JSON file, written after every row.

    With `resume` the rows of an earlier run on the same device, versions and commit are kept and
    `has` them, so an interrupted matrix goes on where it stopped; otherwise it starts empty.
    Raises `ValueError` when asked to resume a file of another machine or commit.
    """

    SAME = ("commit", "device", "python", "versions")

    def __init__(self, path: Path | None, environment: dict[str, Any], *, resume: bool = False):
        self.path, self.environment = path, environment
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []  # keys, which are not tried again on resuming
        self.extra: dict[str, Any] = {}
        if resume and path is not None and path.exists():
            saved = json.loads(path.read_text())
            for key in self.SAME:
                if saved["environment"][key] != environment[key]:
                    raise ValueError(
                        f"{path} was measured with {key} {saved['environment'][key]!r}, and this "
                        f"is {environment[key]!r}; name another file, or leave out --resume"
                    )
            self.rows = [
                {key: NOT_FINITE.get(str(of), of) for key, of in row.items()}
                for row in saved["rows"]
            ]
            self.failed = saved.get("failed", [])

    def has(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, key: str, **values: Any) -> dict[str, Any]:
        row = {"key": key, **values}
        self.rows = [r for r in self.rows if r["key"] != key] + [row]
        self.save()
        return row

    def save(self) -> None:
        if self.path is not None:
            document = {"environment": self.environment, **self.extra, "rows": self.rows}
            if self.failed:
                document["failed"] = self.failed
            write_json(self.path, document)


def write_json(path: Path, document: Any) -> None:
    """Writes beside the file first, so that an interruption leaves the old one whole. What is not
    finite, such as a diverged peer's loss, is its name: JSON has no number for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_without_nan(document), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(of) for of in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text: the first column to the left, numbers to the right, None as `-`."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 3
        return f"{value:.{digits}f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    return str(value)


def left_out_lines(left_out: Sequence[str]) -> list[str]:
    """Lines "KEY: REASON", one for each reason: how many, and which come first."""
    by_reason: dict[str, list[str]] = {}
    for line in left_out:
        key, _, reason = line.partition(": ")
        by_reason.setdefault(reason, []).append(key)
    return [
        f"left out, {reason}: {', '.join(keys[:3])}"
        + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for reason, keys in by_reason.items()
    ]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def matmul_flops_per_second(device: torch.device) -> float:
    """What this device reaches on a large square product of random matrices, in FLOP/s.

    bf16 on CUDA, fp32 on CPU: the denominator of every utilisation quoted here. Median of ten
    products after three to warm up; random, because zeros draw less power and run faster.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = median(timed(lambda: a @ b, device, repeats=10, warmup=3))
    return 2 * size**3 / seconds


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, median of ten after three."""
    size = 2**28 if device.type == "cuda" else 2**24
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    seconds = median(timed(lambda: target.copy_(source), device, repeats=10, warmup=3))
    return 2 * source.nbytes / seconds


def timed(
    function: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int
) -> list[float]:
    """Seconds of each of `repeats` calls, by CUDA events on a GPU, by the wall clock on a CPU."""
    for _ in range(warmup):
        function()
    synchronize(device)
    if device.type != "cuda":
        return [_wall(function) for _ in range(repeats)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _wall(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
