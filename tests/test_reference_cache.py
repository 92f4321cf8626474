"""The reference cache: what is stored is served, what is damaged is not, what changed is missed."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo import cli
from fastdpo.errors import CheckpointError
from fastdpo.reference_cache import (
    FORMAT_FILE,
    REFERENCE_FILE,
    Health,
    ReferenceCache,
    content_hash,
    read_records,
    response_key,
    segments,
    stored_references,
)

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = {"weights": "abc", "dtype": "float32"}
ABOUT = {"model": "tiny", "kind": "copy", "parameters": 7}


def rows(n: int, seed: int = 0) -> dict[bytes, np.ndarray]:
    """n responses of 0 to 6 tokens and their values."""
    rng = np.random.default_rng(seed)
    return {
        response_key(rng.integers(0, 9, 5).astype(np.int32), np.full(i + 1, i, np.int32)): (
            rng.standard_normal(i % 7).astype(np.float32)
        )
        for i in range(n)
    }


def fill(root: Path, values: dict[bytes, np.ndarray]) -> ReferenceCache:
    cache = ReferenceCache(root, DESCRIPTION, ABOUT)
    cache.append(values.items())
    cache.close()
    return cache


def assert_same(found: dict[bytes, np.ndarray], wanted: dict[bytes, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].dtype == np.float32 and np.array_equal(found[key], values)


# ---- what is stored is served -----------------------------------------------------------------


def test_round_trip(tmp_path):
    values = rows(20)
    root = tmp_path / "a" / "cache"
    cache = ReferenceCache(root, DESCRIPTION, ABOUT)
    assert cache.read(set(values)) == ({}, Health())
    assert not root.exists()  # nothing is written before there is something to write
    items = list(values.items())
    cache.append(items[:7])
    assert_same(cache.read(set(values))[0], dict(items[:7]))  # visible before it is closed
    cache.append(items[7:])
    cache.close()
    cache.close()
    found, health = ReferenceCache(root, DESCRIPTION, ABOUT).read(set(values))
    assert_same(found, values)
    assert (health.segments, health.records, health.tokens) == (
        1,
        20,
        sum(len(v) for v in values.values()),
    )
    some = set(list(values)[3:5])
    assert cache.read(some)[0].keys() == some


def test_another_reference_has_other_values(tmp_path):
    values = rows(5)
    fill(tmp_path, values)
    for other in ({**DESCRIPTION, "weights": "abd"}, {**DESCRIPTION, "dtype": "bfloat16"}):
        assert ReferenceCache(tmp_path, other, ABOUT).read(set(values))[0] == {}
    # Records know whose they are: moved under another reference's name they are worth nothing.
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    moved = tmp_path / content_hash({**DESCRIPTION, "weights": "abd"})
    folder.rename(moved)
    found, health = ReferenceCache(tmp_path, {**DESCRIPTION, "weights": "abd"}, {}).read(
        set(values)
    )
    assert found == {} and health.records == 0 and health.torn


def test_keys_tell_prompt_from_response():
    def key(prompt: list[int], response: list[int]) -> bytes:
        return response_key(np.array(prompt, np.int32), np.array(response, np.int32))

    texts = [([], [1, 2]), ([1], [2]), ([1, 2], []), ([1], [2, 0]), ([0, 1], [2]), ([1], [3])]
    assert len({key(*text) for text in texts}) == len(texts)
    assert content_hash({"a": {"y", "x"}}) == content_hash({"a": {"x", "y"}})


def test_the_first_record_of_a_response_counts(tmp_path):
    values = rows(4)
    fill(tmp_path, values)
    fill(tmp_path, {key: v + 1 for key, v in values.items()} | rows(2, seed=1))
    found, health = ReferenceCache(tmp_path, DESCRIPTION, ABOUT).read(set(values))
    assert_same(found, values)
    assert (health.segments, health.records, health.repeated) == (2, 4 + 6, 4)


def test_writers_of_one_cache_do_not_disturb_each_other(tmp_path):
    first, second = (ReferenceCache(tmp_path, DESCRIPTION, ABOUT) for _ in range(2))
    values = list(rows(40).items())
    for i, item in enumerate(values):  # taking turns
        (first if i % 2 else second).append([item])
    assert_same(second.read(set(dict(values)))[0], dict(values))
    first.close()
    second.close()
    found, health = ReferenceCache(tmp_path, DESCRIPTION, ABOUT).read(set(dict(values)))
    assert_same(found, dict(values))
    assert health.segments == 2 and not health.damaged and not health.torn


# ---- damage -----------------------------------------------------------------------------------


def test_damage_at_any_byte_is_noticed_and_costs_one_record(tmp_path):
    values = rows(6)
    fill(tmp_path, values)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    (segment,) = segments(folder)
    whole = segment.read_bytes()
    for at in range(len(whole)):
        for flip in (0x01, 0x80):
            broken = bytearray(whole)
            broken[at] ^= flip
            segment.write_bytes(broken)
            health = Health()
            found = dict(read_records(folder, health))
            assert len(health.damaged) + len(health.torn) == 1, at
            assert len(found) == len(values) - 1, at
            assert all(np.array_equal(found[key], values[key]) for key in found), at


EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans()), max_size=6
)


@given(EDITS)
@settings(max_examples=60, deadline=None)
def test_no_damage_is_ever_served(edits):
    """Several bytes changed or put in at once: what is read is right, what is lost is reported."""
    values = rows(5)
    with tempfile.TemporaryDirectory() as root:
        cache = fill(Path(root), values)
        (segment,) = segments(cache.folder)
        data = bytearray(segment.read_bytes())
        for where, byte, insert in edits:
            at = int(where * len(data))
            data[at : at + (not insert)] = bytes([byte if insert else data[at] ^ byte])
        segment.write_bytes(data)
        found, health = cache.read(set(values))
        assert_same(found, {key: values[key] for key in found})
        assert len(found) == len(values) or health.damaged or health.torn


def test_a_description_damaged_at_any_byte_is_noticed(tmp_path):
    """It is for people: records are served without it, and who reads or adds some mends it."""
    values = rows(2)
    cache = fill(tmp_path, values)
    path = cache.folder / REFERENCE_FILE
    good = path.read_bytes()
    for at in range(len(good)):
        broken = bytearray(good)
        broken[at] ^= 0x01
        path.write_bytes(broken)
        (found,) = stored_references(tmp_path)
        assert found.about is None or json.loads(broken) == json.loads(good), at
    assert_same(cache.read(set(values))[0], values)
    assert path.read_bytes() == good
    path.unlink()
    fill(tmp_path, rows(1, seed=4))
    assert path.read_bytes() == good


def test_a_torn_tail_is_noticed_wherever_it_tore(tmp_path):
    values = rows(5)
    fill(tmp_path, values)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    (segment,) = segments(folder)
    whole = segment.read_bytes()
    sizes = [48 + 4 + 4 * len(v) for v in values.values()]  # sync 8, digest 16, key 24, count 4
    ends = np.cumsum(sizes)
    assert ends[-1] == len(whole)
    for size in range(len(whole)):
        segment.write_bytes(whole[:size])
        health = Health()
        n = len(list(read_records(folder, health)))
        assert n == int((ends <= size).sum())
        assert bool(health.torn) == (size not in (0, *ends)) and not health.damaged
    # Garbage between records, and the sync mark inside of values: neither hides what follows.
    first = sizes[0]
    segment.write_bytes(whole[:first] + b"\xf5fdporec" * 3 + whole[first:])
    health = Health()
    assert len(list(read_records(folder, health))) == 5 and len(health.damaged) == 1
    tricky = {b"k" * 24: np.frombuffer(b"\xf5fdporec" * 8, dtype="<f4")}
    fill(tmp_path, tricky)
    assert_same(ReferenceCache(tmp_path, DESCRIPTION, ABOUT).read(set(tricky))[0], tricky)


def test_another_version_is_refused_and_a_damaged_marker_mended(tmp_path):
    values = rows(3)
    fill(tmp_path, values)
    marker = tmp_path / FORMAT_FILE
    good = marker.read_bytes()
    for at in range(len(good)):  # never taken for another version, never in the way
        broken = bytearray(good)
        broken[at] ^= 0x01
        marker.write_bytes(broken)
        assert len(ReferenceCache(tmp_path, DESCRIPTION, ABOUT).read(set(values))[0]) == 3, at
        assert marker.read_bytes() == good
    marker.unlink()
    fill(tmp_path, rows(1, seed=4))
    assert marker.read_bytes() == good
    from fastdpo.reference_cache import _check

    text = b"fastdpo reference cache, format 2"
    marker.write_bytes(text + b", check " + _check(text) + b"\n")
    with pytest.raises(CheckpointError, match="format 2.*reads format 1"):
        ReferenceCache(tmp_path, DESCRIPTION, ABOUT)


def test_folders_that_are_no_cache(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        ReferenceCache(tmp_path, DESCRIPTION, ABOUT)
    with pytest.raises(CheckpointError, match="can't be read"):
        ReferenceCache(tmp_path / "thesis.tex", DESCRIPTION, ABOUT)
    with pytest.raises(CheckpointError, match="there is no reference cache"):
        stored_references(tmp_path / "nowhere")
    # A file where the folder should be: the first write says so.
    late = ReferenceCache(tmp_path / "late" / "cache", DESCRIPTION, ABOUT)
    (tmp_path / "late").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        late.append(rows(1).items())


def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch):
    values = list(rows(10).items())
    cache = ReferenceCache(tmp_path, DESCRIPTION, ABOUT)
    cache.append(values[:4])
    assert cache._segment is not None
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(cache, "_segment", full)
        with pytest.raises(CheckpointError, match="No space left.*stays good"):
            cache.append(values[4:])
        monkeypatch.undo()
    assert_same(
        ReferenceCache(tmp_path, DESCRIPTION, ABOUT).read(set(dict(values)))[0], dict(values[:4])
    )


KILLED = """
import sys, numpy as np
sys.path[:0] = sys.argv[2:]
from tests.test_reference_cache import ABOUT, DESCRIPTION, rows
from fastdpo.reference_cache import ReferenceCache
cache = ReferenceCache(sys.argv[1], DESCRIPTION, ABOUT)
while True:
    for item in rows(50).items():
        cache.append([item])
        print(flush=True)
"""


def test_a_killed_writer_leaves_whole_records(tmp_path):
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tmp_path),
        str(ROOT),
        str(ROOT / "kernels/torch-ext"),
    ]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    for _ in range(30):
        writer.stdout.readline()
    writer.kill()
    writer.wait()
    values = rows(50)
    found, health = ReferenceCache(tmp_path, DESCRIPTION, ABOUT).read(set(values))
    assert len(found) >= 30 and not health.damaged
    assert all(np.array_equal(found[key], values[key]) for key in found)


# ---- fastdpo cache ----------------------------------------------------------------------------


def run(*words: str, capsys) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["cache", *words])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_info_and_verify(tmp_path, capsys):
    cache = fill(tmp_path, rows(6))
    status, out, _ = run("info", str(tmp_path), capsys=capsys)
    assert status == 0 and cache.name[:12] in out and "tiny" in out and "6 responses" in out
    status, out, _ = run("verify", str(tmp_path), capsys=capsys)
    assert status == 0 and "whole" in out
    (segment,) = segments(cache.folder)
    data = bytearray(segment.read_bytes())
    data[60] ^= 1
    segment.write_bytes(data)
    status, out, _ = run("verify", str(tmp_path), capsys=capsys)
    assert status == 1 and segment.name in out and "computed again" in out
    (cache.folder / REFERENCE_FILE).write_text("{}")
    status, out, _ = run("verify", str(tmp_path), capsys=capsys)
    assert status == 1 and REFERENCE_FILE in out and "mends it" in out
    (tmp_path / FORMAT_FILE).write_text("fastdpo reference cache, format 7, check 01234567\n")
    status, out, _ = run("verify", str(tmp_path), capsys=capsys)
    assert status == 1 and FORMAT_FILE in out
    assert cache.read(set(rows(6)))[1].mended == [FORMAT_FILE, REFERENCE_FILE]
    assert cache.read(set(rows(6)))[1].mended == []
    assert run("prune", str(tmp_path), capsys=capsys)[0] == 0
    assert run("verify", str(tmp_path), capsys=capsys)[0] == 0


def test_prune_keeps_what_is_good(tmp_path, capsys):
    values = rows(6)
    cache = fill(tmp_path, values)
    fill(tmp_path, values)
    before = segments(cache.folder)
    data = bytearray(before[0].read_bytes())
    data[60] ^= 1
    before[0].write_bytes(data)
    writer = ReferenceCache(tmp_path, DESCRIPTION, ABOUT)
    writer.append(rows(1, seed=3).items())
    status, out, _ = run("prune", str(tmp_path), capsys=capsys)
    assert status == 0 and "in use" in out and len(segments(cache.folder)) == 3
    writer.close()
    assert run("prune", str(tmp_path), capsys=capsys)[0] == 0
    (left,) = segments(cache.folder)
    assert "nothing to drop" in run("prune", str(tmp_path), capsys=capsys)[1]
    found, health = cache.read(set(values))
    assert_same(found, values)
    assert not health.damaged and not health.repeated
    assert run("verify", str(tmp_path), capsys=capsys)[0] == 0
    with left.open("rb") as file:  # nobody holds it any more
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_prune_by_name_and_by_age(tmp_path, capsys):
    cache = fill(tmp_path, rows(6))
    other = ReferenceCache(tmp_path, {**DESCRIPTION, "weights": "new"}, ABOUT)
    other.append(rows(2).items())
    other.close()
    month_ago = time.time() - 30 * 86400
    os.utime(cache.folder / REFERENCE_FILE, (month_ago, month_ago))
    status, out, _ = run("prune", str(tmp_path), "--unused_days", "31", capsys=capsys)
    assert status == 0 and "no reference is that long unused" in out
    assert cache.folder.exists() and other.folder.exists()
    assert run("prune", str(tmp_path), "--unused_days", "29", capsys=capsys)[0] == 0
    assert not cache.folder.exists() and other.folder.exists()
    status, _, err = run("prune", str(tmp_path), "--reference", "zzz", capsys=capsys)
    assert status == 2 and "'zzz'" in err and other.name[:12] in err
    assert run("prune", str(tmp_path), "--reference", other.name[:8], capsys=capsys)[0] == 0
    assert not other.folder.exists()


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], ["info, verify, prune"]),
        (["inof", "x"], ["'inof'", "did you mean 'info'"]),
        (["info"], ["folder"]),
        (["info", "{tmp}/nowhere"], ["no reference cache", "nowhere"]),
        (["info", "{tmp}", "--beta", "1"], ["--beta"]),
        (["prune", "{tmp}", "--unused_days", "soon"], ["unused_days", "soon"]),
        (["prune", "{tmp}", "--unused_days", "-1"], ["unused_days", ">= 0", "-1"]),
        (["prune", "{tmp}", "--unused_days", "nan"], ["unused_days", "nan"]),
    ],
)
def test_bad_words(tmp_path, capsys, words, parts):
    status, _, err = run(*(word.format(tmp=tmp_path) for word in words), capsys=capsys)
    assert status == 2 and err.count("\n") == 1
    assert all(part in err for part in parts), err
