"""Running Triton's interpreter in tests: in a process of its own, and several times faster.

TRITON_INTERPRET has to be set before triton is imported, and must not be set for anybody else.
"""

import inspect
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[2]

needs_interpreter = pytest.mark.skipif(
    version("triton").startswith("3.6") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 does not run on NumPy 2.4 or newer",
)


def run_interpreted(*names: str, marks: str) -> None:
    """Runs files of tests beside this one with the interpreter on; fails with their report."""
    files = [str(Path(__file__).with_name(name)) for name in names]
    command = [
        sys.executable, "-m", "pytest", *files, "-q", "-m", marks,
        "-p", "no:cacheprovider", "--durations=5",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}")
    print("\n".join(done.stdout.splitlines()[-12:]))


def patch_once() -> None:
    """Lets the interpreter patch `triton.language` once per launch.

    It does so again for every call of a device function, `tl.sum` and its like included, which is
    most of the time of an interpreted run. What it finds patched it leaves as it is, so one time
    is enough.
    """
    from triton.runtime import interpreter

    inner = interpreter._patch_lang
    patched: set[int] = set()
    languages: dict[object, frozenset[int]] = {}

    def patch_lang(fn):
        if fn not in languages:
            modules = [m for m in fn.__globals__.values() if inspect.ismodule(m)]
            known = (interpreter.tl, interpreter.tl.core)
            languages[fn] = frozenset(id(m) for m in modules if m in known)
        if patched and languages[fn] <= patched:
            return None  # a device function; the launch holds what undoes the patches
        scope = inner(fn)
        if not patched:
            restore = scope.restore

            def restore_and_forget():
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        patched.update(languages[fn])
        return scope

    interpreter._patch_lang = patch_lang
