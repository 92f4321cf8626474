"""`fastdpo cache info|verify|prune DIR`: what a reference cache holds, whether it is whole, and
what of it to let go. Nothing here needs torch."""

import math
from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError, did_you_mean
from .reference_cache import (
    FORMAT_FILE,
    REFERENCE_FILE,
    StoredReference,
    compact,
    days_since,
    marker_is_whole,
    remove_reference,
    stored_references,
)

USAGE = """\
fastdpo cache info DIR      its references: models, responses, sizes
fastdpo cache verify DIR    reads and checks every record; status 1 if some are damaged
fastdpo cache prune DIR     drops damaged and repeated records
        --reference NAME    deletes this reference, named by its first digits
        --unused_days N     deletes references that no run has read or written for N days
"""
ACTIONS = ("info", "verify", "prune")


def main(words: Sequence[str]) -> int:
    """Runs `fastdpo cache WORDS`; returns the exit status. Raises `FastDPOError`."""
    if {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0
    action, *rest = words or [""]
    if action not in ACTIONS:
        raise ConfigError(
            f"`fastdpo cache` expects {', '.join(ACTIONS)}; got {action!r}"
            f"{did_you_mean(action, ACTIONS)}"
        )
    flags = ("reference", "unused_days") if action == "prune" else ()
    folder, options = _parse(action, rest, flags)
    references = stored_references(folder)
    if action == "info":
        return _info(folder, references)
    if action == "verify":
        return _verify(folder, references)
    return _prune(folder, references, options)


def _parse(action: str, words: Sequence[str], flags: Sequence[str]) -> tuple[Path, dict[str, str]]:
    folders, options = [], {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            folders.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in flags or name in options:
            known = ", ".join(f"--{flag}" for flag in flags) or "none"
            raise ConfigError(
                f"`fastdpo cache {action}` has no option {word!r} here; its options, once each: "
                f"{known}"
            )
        if not equals and not rest:
            raise ConfigError(f"'--{name}' expects a value, and nothing follows it")
        options[name] = value if equals else rest.pop(0)
    if len(folders) != 1:
        raise ConfigError(
            f"`fastdpo cache {action}` expects one folder, got {', '.join(folders) or 'none'}"
        )
    return Path(folders[0]), options


def _info(folder: Path, references: list[StoredReference]) -> int:
    size = sum(reference.health.bytes for reference in references)
    print(f"{folder}: {_count(len(references), 'reference')}, {size / 2**20:.1f} MiB")
    for reference in references:
        health, about = reference.health, reference.about
        print(f"  {reference.name[:12]}  {_what(about)}")
        print(
            f"      {_count(health.records - health.repeated, 'response')}, "
            f"{_count(health.tokens, 'token')}, {health.bytes / 2**20:.1f} MiB in "
            f"{_count(health.segments, 'segment')}; used {days_since(reference.last_used):.0f} "
            "days ago"
        )
    return 0


def _what(about: dict | None) -> str:
    if about is None:
        return f"(what it is can't be read: {REFERENCE_FILE} is damaged)"
    kind = "with its adapter" if about.get("adapters") else "without adapters"
    quantized = ", quantized" if about.get("quantized") else ""
    compute = about.get("compute")
    compute = about.get("dtype") if compute == "as weights" else compute
    return (
        f"{about.get('model')} {kind}, {about.get('dtype')}{quantized}, computed in "
        f"{compute}, {about.get('packs')} packs, {about.get('attention')} attention"
    )


def _verify(folder: Path, references: list[StoredReference]) -> int:
    faults = 0
    if references and not marker_is_whole(folder):
        faults += 1
        print(f"  damaged: {FORMAT_FILE}; the next run that uses the cache mends it")
    for reference in references:
        wrong = [f"damaged: {where}" for where in reference.health.damaged]
        wrong += [f"incomplete or damaged at its end: {where}" for where in reference.health.torn]
        if reference.about is None:
            wrong.append(f"damaged: {REFERENCE_FILE}; the next run of this reference mends it")
        faults += len(wrong)
        for line in wrong:
            print(f"  {reference.name[:12]}  {line}")
    records = sum(reference.health.records for reference in references)
    if faults:
        print(
            f"{folder}: {_count(records, 'good record')}, {_count(faults, 'fault')}; no run trusts "
            "these; damaged records are computed again, and `fastdpo cache prune` drops them"
        )
        return 1
    print(f"{folder}: whole; {_count(records, 'record')} of {_count(len(references), 'reference')}")
    return 0


def _prune(folder: Path, references: list[StoredReference], options: dict[str, str]) -> int:
    if not options:
        loose = [r for r in references if _is_loose(r)]
        for reference in loose:
            done = "rewritten whole" if compact(reference) else "in use by a run: left alone"
            print(f"  {reference.name[:12]}  {done}")
        if not loose:
            print(f"{folder}: nothing to drop")
        return 0
    chosen = references
    if (name := options.get("reference")) is not None:
        chosen = [r for r in chosen if name and r.name.startswith(name)]
        if len(chosen) != 1:
            names = ", ".join(r.name[:12] for r in references) or "none"
            raise ConfigError(f"'--reference' {name!r} names {len(chosen)}; there are {names}")
    if (days := options.get("unused_days")) is not None:
        try:
            limit = float(days)
        except ValueError:
            limit = math.nan
        if not limit >= 0:
            raise ConfigError(f"'--unused_days' expects a number >= 0, got {days!r}")
        chosen = [r for r in chosen if days_since(r.last_used) >= limit]
    for reference in chosen:
        done = "deleted" if remove_reference(reference) else "in use by a run: left alone"
        print(f"  {reference.name[:12]}  {done}: {_what(reference.about)}")
    if not chosen:
        print(f"{folder}: no reference is that long unused")
    return 0


def _is_loose(reference: StoredReference) -> bool:
    """Whether rewriting it would drop or join anything."""
    health = reference.health
    return bool(health.segments > 1 or health.damaged or health.torn or health.repeated)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
