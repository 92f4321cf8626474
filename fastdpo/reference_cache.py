"""The reference cache on disk: per-token fp32 log-probs of responses, found by content.

    ROOT/format.txt                       whose cache this is, and in which format
    ROOT/<reference>/reference.json       what the reference is; its hash is the folder's name
    ROOT/<reference>/NNNNNN-<id>.logps    records, appended by one writer and by no other

A record is checked by a hash of all it says and of the reference it belongs to; one that fails is
passed over and computed again. Here are bytes and files; what a reference is: reference_key.py.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import CheckpointError

FORMAT = 1
FORMAT_FILE = "format.txt"
REFERENCE_FILE = "reference.json"
SEGMENT = re.compile(r"(\d{6})-[0-9a-f]{16}\.logps")
REFERENCE = re.compile(r"[0-9a-f]{32}")

# A record: sync, digest, key, count (uint32), then count little-endian fp32 values.
SYNC = b"\xf5fdporec"
KEY_BYTES = 24
DIGEST_BYTES = 16
HEAD_BYTES = len(SYNC) + DIGEST_BYTES + KEY_BYTES + 4


def response_key(prompt: np.ndarray, response: np.ndarray) -> bytes:
    """The content hash of a response [n] behind a prompt [m], both int32 token ids."""
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(prompt.astype("<i4", copy=False).tobytes())
    digest.update(response.astype("<i4", copy=False).tobytes())
    return digest.digest()


def content_hash(description: dict[str, Any]) -> str:
    """The name that a reference of this description has: 32 hexadecimal digits."""

    def plain(value: Any) -> Any:  # a set has no order of its own
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)

    text = json.dumps(description, sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"fastdpo-ref").hexdigest()


@dataclass
class Health:
    """What reading found: `records` good ones, of which `repeated` were there before; spans of
    bytes that are none: `damaged` inside a segment, `torn` at its end; and the other files that
    were damaged and are `mended` now."""

    segments: int = 0
    records: int = 0
    repeated: int = 0
    tokens: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)


class ReferenceCache:
    """The records of one reference under `root`. `description` says which; see reference_key.py.

    Readers take no lock; a writer has a segment of its own, made with the first record. So any
    number of runs may share a cache. Raises `CheckpointError` for a folder that is no cache, for
    another format, and where the disk refuses.
    """

    def __init__(self, root: str | Path, description: dict[str, Any], about: dict[str, Any]):
        self.root = Path(root)
        self.name = content_hash(description)
        self.folder = self.root / self.name
        self._description, self._about = description, about
        self._segment: BinaryIO | None = None
        check_format(self.root)

    def read(self, wanted: set[bytes]) -> tuple[dict[bytes, np.ndarray], Health]:
        """The values (fp32) of those `wanted` keys that are here, each checked as it is read."""
        found: dict[bytes, np.ndarray] = {}
        health = Health()
        for key, values in read_records(self.folder, health):
            if key in wanted and key not in found:  # the first record wins: values never change
                found[key] = values
        if found:
            with contextlib.suppress(OSError):  # a read-only cache serves as well
                if not marker_is_whole(self.root):
                    make_root(self.root)
                    health.mended.append(FORMAT_FILE)
                if _about(self.folder) is None:
                    self._describe()
                    health.mended.append(REFERENCE_FILE)
                os.utime(self.folder / REFERENCE_FILE)
        return found, health

    def append(self, rows: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Writes (key, values) records, whole before the next call; synced to disk on `close`."""
        data = b"".join(encode(self.name, key, values) for key, values in rows)
        try:
            if self._segment is None:
                self._segment = self._new_segment()
            self._segment.write(data)
            self._segment.flush()
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Waits until the disk has everything that was appended."""
        if self._segment is None:
            return
        segment, self._segment = self._segment, None
        try:
            with segment:
                os.fsync(segment.fileno())
            _sync_folder(self.folder)
        except OSError as error:
            raise self._refusal(error) from error

    def _new_segment(self) -> BinaryIO:
        make_root(self.root)
        self.folder.mkdir(exist_ok=True)
        self._describe()
        return new_segment(self.folder)

    def _describe(self) -> None:
        """Writes what the reference is, or mends it."""
        held: dict[str, Any] = {"reference": self._description, "about": self._about}
        held["check"] = content_hash(held)
        _write_whole(self.folder / REFERENCE_FILE, json.dumps(held, indent=2) + "\n")

    def _refusal(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"reference cache {str(self.root)!r} can't be written: {error.strerror or error}; what "
            "it holds stays good: make room or choose another ref_cache_dir, and run again"
        )


# ---- records ---------------------------------------------------------------------------------


def encode(reference: str, key: bytes, values: np.ndarray) -> bytes:
    """One record: `values` [n] fp32 of the response `key` under `reference`."""
    payload = values.astype("<f4", copy=False).tobytes()
    count = len(values).to_bytes(4, "little")
    return SYNC + _digest(reference, key, count, payload) + key + count + payload


def _digest(reference: str, key: bytes, count: bytes, payload: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"fastdpo-row-%d" % FORMAT)
    for part in (reference.encode(), key, count, payload):
        digest.update(part)
    return digest.digest()


def read_records(folder: Path, health: Health) -> Iterator[tuple[bytes, np.ndarray]]:
    """Every good record of a reference's folder, the oldest segment first; `health` is filled."""
    seen: set[bytes] = set()
    for path in segments(folder):
        health.segments += 1
        for key, values in _read_segment(path, folder.name, health):
            health.records += 1
            health.tokens += len(values)
            health.repeated += key in seen
            seen.add(key)
            yield key, values


def _read_segment(path: Path, reference: str, health: Health) -> Iterator[tuple[bytes, np.ndarray]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:  # pruned a moment ago
        return
    except OSError as error:
        raise CheckpointError(
            f"reference cache segment {str(path)!r} can't be read: {error.strerror or error}"
        ) from error
    health.bytes += len(data)
    at = good = 0  # `good`: the end of the last good record
    while at < len(data):
        record = _record_at(data, at, reference)
        if record is None:
            at = data.find(SYNC, at + 1)
            if at < 0:
                break
            continue
        if good < at:
            health.damaged.append(f"{path.name} bytes {good} to {at}")
        key, values, at = record
        good = at
        yield key, values
    if good < len(data):
        health.torn.append(f"{path.name} bytes {good} to {len(data)}")


def _record_at(data: bytes, at: int, reference: str) -> tuple[bytes, np.ndarray, int] | None:
    """(key, values, end) of the record that starts at `at`; None if there is no whole one."""
    if data[at : at + len(SYNC)] != SYNC or at + HEAD_BYTES > len(data):
        return None
    digest_at = at + len(SYNC)
    key_at = digest_at + DIGEST_BYTES
    count = data[key_at + KEY_BYTES : at + HEAD_BYTES]
    end = at + HEAD_BYTES + 4 * int.from_bytes(count, "little")
    if end > len(data):
        return None
    key = data[key_at : key_at + KEY_BYTES]
    payload = memoryview(data)[at + HEAD_BYTES : end]
    if _digest(reference, key, count, payload) != data[digest_at:key_at]:
        return None
    return key, np.frombuffer(payload, dtype="<f4").astype(np.float32), end


# ---- folders and segments --------------------------------------------------------------------


def check_format(root: Path) -> bool:
    """Whether `root` is a cache already; `CheckpointError` if it is something else.

    A marker that fails its own check is damage, no other format: the next run that uses the cache
    writes it anew, and records answer for themselves.
    """
    try:
        if not root.exists():
            return False
        names = os.listdir(root)
        marker = (root / FORMAT_FILE).read_bytes() if FORMAT_FILE in names else None
    except OSError as error:
        raise CheckpointError(
            f"reference cache {str(root)!r} can't be read: {error.strerror or error}; "
            "choose another ref_cache_dir"
        ) from error
    match = re.fullmatch(
        rb"(fastdpo reference cache, format (\d+)), check (\w{8})\n", marker or b""
    )
    if match and match[3] == _check(match[1]) and int(match[2]) != FORMAT:
        raise CheckpointError(
            f"reference cache {str(root)!r} has format {int(match[2])}, and this version of "
            f"fastdpo reads format {FORMAT}; choose another ref_cache_dir, or delete that folder"
        )
    foreign = [n for n in names if n != FORMAT_FILE and not REFERENCE.fullmatch(n)]
    foreign = [n for n in foreign if not n.startswith(".")]
    if marker is None and foreign:
        raise CheckpointError(
            f"ref_cache_dir {str(root)!r} holds other files ({foreign[0]}) and no reference cache; "
            "choose an empty or a new folder"
        )
    return True


def _check(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=4).hexdigest().encode()


def make_root(root: Path) -> None:
    """Makes the folder and its marker, or mends a damaged marker."""
    root.mkdir(parents=True, exist_ok=True)
    _write_whole(root / FORMAT_FILE, _marker())


def marker_is_whole(root: Path) -> bool:
    """Whether the marker of the cache `root` says what it should."""
    path = root / FORMAT_FILE
    return path.exists() and path.read_bytes() == _marker().encode()


def _marker() -> str:
    text = f"fastdpo reference cache, format {FORMAT}"
    return f"{text}, check {_check(text.encode()).decode()}\n"


def segments(folder: Path) -> list[Path]:
    """The segments of a reference, in the order in which their records count."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if SEGMENT.fullmatch(path.name))


def new_segment(folder: Path) -> BinaryIO:
    """A new, last, empty segment, locked for as long as it is open: `prune` leaves it alone."""
    taken = [int(path.name[:6]) for path in segments(folder)]
    name = f"{max(taken, default=-1) + 1:06d}-{secrets.token_hex(8)}.logps"
    segment = (folder / name).open("xb")
    with contextlib.suppress(OSError):  # a disk without locks: pruning could cost work, not truth
        fcntl.flock(segment, fcntl.LOCK_EX)
    return segment


def _write_whole(path: Path, text: str) -> None:
    """`path` holds `text` whole, or what it held before."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == text.encode():
            return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- what `fastdpo cache` does ---------------------------------------------------------------


@dataclass(frozen=True)
class StoredReference:
    """A reference's folder as it is found; `about` is None where reference.json is damaged."""

    folder: Path
    about: dict[str, Any] | None
    last_used: float  # seconds since the epoch
    health: Health

    @property
    def name(self) -> str:
        return self.folder.name


def stored_references(root: Path) -> list[StoredReference]:
    """All references of a cache, every record checked; `CheckpointError` if `root` is no cache."""
    if not check_format(root):
        raise CheckpointError(f"there is no reference cache in {str(root)!r}")
    found = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and REFERENCE.fullmatch(p.name)):
        health = Health()
        for _ in read_records(folder, health):
            pass
        description = folder / REFERENCE_FILE
        used = description if description.exists() else folder
        found.append(StoredReference(folder, _about(folder), used.stat().st_mtime, health))
    return found


def _about(folder: Path) -> dict[str, Any] | None:
    """What reference.json says of the reference, if it is whole and of this folder."""
    try:
        held = json.loads((folder / REFERENCE_FILE).read_bytes())
        if content_hash(held["reference"]) != folder.name:
            return None
        if held.pop("check") != content_hash(held):
            return None
        return {**held["about"], **held["reference"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_reference(reference: StoredReference) -> bool:
    """Deletes a reference with all its records; False, and nothing done, while a run writes it."""
    with _locked(segments(reference.folder)) as free:
        if free:
            shutil.rmtree(reference.folder)
    return free


def compact(reference: StoredReference) -> bool:
    """Rewrites a reference's segments as one, without damage and repeats; False while a run
    writes them. The new segment is on disk before the old ones go."""
    old = segments(reference.folder)
    with _locked(old) as free:
        if not free:
            return False
        kept: dict[bytes, np.ndarray] = {}
        for key, values in read_records(reference.folder, Health()):
            kept.setdefault(key, values)
        with new_segment(reference.folder) as segment:
            for key, values in kept.items():
                segment.write(encode(reference.name, key, values))
            segment.flush()
            os.fsync(segment.fileno())
        _sync_folder(reference.folder)
        for path in old:
            path.unlink()
    return True


@contextlib.contextmanager
def _locked(paths: list[Path]) -> Iterator[bool]:
    """Whether no writer has any of `paths`; if so none gets one inside."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            file = stack.enter_context(path.open("rb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
        yield True


def days_since(moment: float) -> float:
    return max(0.0, time.time() - moment) / 86400
