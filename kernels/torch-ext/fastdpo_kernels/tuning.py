"""The measured choice among the variants of `tiles.py`, cached on disk.

On a GPU variants are timed on the first call of a kind, for a few seconds at most (the host waits
for the device then, and at no later call), and the winner is kept on disk; without measurements
(and under `torch.use_deterministic_algorithms`, where a run's bits must not hang on timings) the
first row of the table is taken. No kernel is known here: the caller passes what is to be timed.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import tiles
from .tiles import Device, Gemm, Plan, Problem, Variant

logger = logging.getLogger("fastdpo_kernels")

_BUDGET = 3.0  # seconds that the first call of a kind may spend on measuring
_WORTH = 1e-3  # seconds (by the roofline) under which there is too little to gain
_chosen: dict[str, Variant] = {}


def choose(
    problem: Problem, device: Device, run: Callable[[Plan], object], *, measure: bool
) -> Plan:
    """The plan for `problem`: the fastest variant known, measured now if that has not been done.

    `run(plan)` does the work once, on real inputs, into tensors of its own.
    """
    first = tiles.plan(problem, tiles.default_variant(problem, device), device)
    cost = tiles.roofline(problem, first.variant, device, first.rows, first.cols, first.splits)
    if not measure or cost < _WORTH:
        return first
    key = _key(problem, device)
    if key not in _chosen:
        _chosen[key] = _load(key) or _measure(problem, device, run, key)
    try:
        return tiles.plan(problem, _chosen[key], device)
    except ValueError:  # measured with another N of the same bucket
        return first


def measurable(device: torch.device) -> bool:
    """Whether this call may take the time to measure."""
    return (
        device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _rounds(problem: Problem, device: Device) -> list[Callable[[Variant], list[Variant]]]:
    """What to try, one kind of change after the other, each on the best so far."""
    default = tiles.default_variant(problem, device)

    def gemms(_: Variant) -> list[Variant]:
        fused = [Variant(gemm) for gemm in tiles.table(problem, device)]
        return [default, *fused, Variant(tiles.LIBRARY, library=True)]

    def groups(best: Variant) -> list[Variant]:
        others = [dataclasses.replace(best.gemm, group=group) for group in (8, 32)]
        return [] if best.library else [dataclasses.replace(best, gemm=gemm) for gemm in others]

    def shares(best: Variant) -> list[Variant]:
        return [dataclasses.replace(best, share=share) for share in (0.5, 0.2)]

    def splits(best: Variant) -> list[Variant]:
        if tiles.plan(problem, best, device).splits == 1:
            return []
        return [dataclasses.replace(best, split=False)]

    rounds = [] if problem.work == "weight" and problem.kept else [gemms, groups]
    if problem.work != "sums":
        rounds.append(shares)
    if problem.work == "hidden":
        rounds.append(splits)
    return rounds


def _measure(problem: Problem, device: Device, run: Callable[[Plan], object], key: str) -> Variant:
    started = time.monotonic()
    times: dict[Variant, float] = {}
    best = tiles.default_variant(problem, device)
    longest, cut = 0.0, False
    for candidates in _rounds(problem, device):
        for variant in candidates(best):
            if variant in times:
                continue
            if times and time.monotonic() - started + longest > _BUDGET:
                cut = True
                break
            before = time.monotonic()
            times[variant] = _time(problem, variant, device, run)
            longest = max(longest, time.monotonic() - before)
        if times:
            best = min(times, key=lambda variant: times[variant])
    seconds = time.monotonic() - started
    logger.info(
        "linear_logps: %s, N=%d D=%d V=%d: %s (%.2f ms; %d variants timed in %.1f s)",
        problem.work, problem.n, problem.d, problem.v, best,
        1e3 * times.get(best, math.nan), len(times), seconds,
    )  # fmt: skip
    _store(key, best, complete=not cut)
    return best


def _time(
    problem: Problem, variant: Variant, device: Device, run: Callable[[Plan], object]
) -> float:
    """Seconds of one run; infinity for a variant that cannot run here."""
    from triton.errors import TritonError  # too much shared memory, a failed compilation

    try:
        fitted = tiles.plan(problem, variant, device)
        run(fitted)  # compiles
        best = math.inf
        for _ in range(3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(fitted)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
            if best > 0.1:
                break
        return best
    except (ValueError, RuntimeError, TritonError) as error:
        logger.info("linear_logps: %s cannot run here: %s", variant, str(error).splitlines()[:1])
        return math.inf


# ---- on disk: one small JSON file per kind of problem


def cache_dir() -> Path:
    """Where measured choices are kept: $FASTDPO_CACHE_DIR, else the user's cache folder."""
    if named := os.environ.get("FASTDPO_CACHE_DIR"):
        return Path(named) / "tuning"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fastdpo" / "tuning"


@functools.lru_cache(maxsize=4096)
def _key(problem: Problem, device: Device) -> str:
    """Everything a measured choice depends on; N by powers of two."""
    import triton

    bucket = dataclasses.replace(problem, n=1 << max(problem.n - 1, 1).bit_length())
    parts = dataclasses.asdict(bucket) | dataclasses.asdict(device)
    parts |= {"torch": torch.__version__, "triton": triton.__version__, "tables": _tables_hash()}
    return json.dumps(parts, sort_keys=True)


@functools.cache
def _tables_hash() -> str:
    return hashlib.sha256(repr(tiles.TABLES).encode()).hexdigest()[:12]


def _file(key: str) -> Path:
    return cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _load(key: str) -> Variant | None:
    """The stored choice; None if there is none, or if measuring was cut short."""
    try:
        saved = json.loads(_file(key).read_text())
        if saved["key"] != key or not saved["complete"]:
            return None
        return Variant(**(saved["variant"] | {"gemm": Gemm(**saved["variant"]["gemm"])}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("ignoring the unreadable tuning file %s: %s", _file(key), error)
        return None


def _store(key: str, variant: Variant, *, complete: bool) -> None:
    path = _file(key)
    text = json.dumps(
        {"key": key, "complete": complete, "variant": dataclasses.asdict(variant)}, indent=1
    )
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        logger.warning("cannot keep the tuning choice in %s: %s", path.parent, error)
