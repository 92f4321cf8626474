"""Every Triton kernel compiles for every architecture with a table, default tiles spill nothing,
and every launch binds its arguments.

No GPU is needed. The compiler runs in processes of its own, without TRITON_INTERPRET; the table of
resources is printed (pytest -s, or `python -m tests.kernels.aot`).
"""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.interpreter import ROOT

# Default rows that may have a stack frame: tiles of Ampere spill up to 250 bytes at sizes that
# divide by nothing (Triton 3.9). Heads have no such sizes; smaller tiles cost those they have.
ALLOWED_ODD = ("sm80", "sm86")
# 8 bytes: of a tile that is no default (fp32 takes the library's product; Triton 3.6), of what runs
# where a row reached the clamp (Triton 3.6), of an epilogue that 16 bits take if it is faster.
ALLOWED = {
    ("sm80", "float32 scaled pointer 64x64x32"),
    ("sm80", "exact rows fp32 full"),
    ("sm86", "epilogue alone scaled bf16 full"),
}


def run_program(name: str, *arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", f"tests.kernels.{name}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(rows: list[dict]) -> str:
    lines = [f"{'arch':6} {'kernel':48} warps stages registers stack shared  instructions"]
    for r in rows:
        lines.append(
            f"{r['arch']:6} {r['label']:48} {r['warps']:5} {r['stages']:6} {r['registers']:9} "
            f"{r['stack']:5} {r['shared']:6}  {' '.join(r['instructions'])}"
        )
    return "\n".join(lines)


PRODUCTS = {"sm80": "mma", "sm86": "mma", "sm90": "wgmma", "sm100": "tcgen05", "sm120": "mma"}


def check(rows: list[dict], capsys, architectures: tuple[str, ...]) -> None:
    with capsys.disabled():
        print("\n" + table(rows))
    assert {r["arch"] for r in rows} == set(architectures)
    for r in rows:
        where = f"{r['label']} on {r['arch']}"
        assert r["shared"] <= r["shared_limit"], f"{where}: {r['shared']} bytes of shared memory"
        allowed = r["arch"] in ALLOWED_ODD and r["label"].endswith(" odd") or not r["default"]
        allowed = allowed or (r["stack"] <= 8 and (r["arch"], r["label"]) in ALLOWED)
        assert r["stack"] == 0 or allowed, f"{where}: a stack frame of {r['stack']} bytes"
        if r["label"].startswith(("half", "rich", "stats")):
            expected = PRODUCTS[r["arch"]]
            assert expected in r["instructions"], f"{where}: no {expected}"
            described = "descriptor" in r["label"] or "persistent" in r["label"]
            assert described == ("tma" in r["instructions"]), where


def test_default_tiles(capsys):
    check(run_program("aot"), capsys, ("sm80", "sm90", "sm100"))


@pytest.mark.soak
@pytest.mark.parametrize("arch", PRODUCTS)
def test_every_tile(arch, capsys):
    check(run_program("aot", "--scope", "all", "--arch", arch), capsys, (arch,))


def check_launches(launches: list[dict]) -> None:
    """Each kernel is compiled for what it does, and for no N of its own."""
    compiled: dict[tuple, dict[int, set]] = {}
    for launch in launches:
        by_n = compiled.setdefault((launch["kernel"], launch["dtype"]), {})
        by_n.setdefault(launch["n"], set()).add(launch["hash"])
    for kernel, by_n in compiled.items():
        first = next(iter(by_n.values()))
        assert all(hashes == first for hashes in by_n.values()), f"{kernel} compiles anew by N"


def test_launches_bind_and_compile():
    launches = run_program("launches", "--dtype", "bfloat16")
    check_launches(launches)
    assert len({launch["kernel"] for launch in launches}) == 10


@pytest.mark.soak
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100", "sm120"])
def test_launches_on_every_architecture(arch):
    check_launches(run_program("launches", "--arch", arch))
