"""Benchmarks and the GPU check; run them from the repository root: `python -m benchmarks.NAME`.

They need no installation: the two packages are found beside this folder. Nothing under fastdpo/,
kernels/ or tests/ imports from here, except the smoke tests.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (str(ROOT), str(ROOT / "kernels" / "torch-ext"))

for _folder in PACKAGES:
    if _folder not in sys.path:
        sys.path.insert(0, _folder)


def child_environment(**variables: str) -> dict[str, str]:
    """The environment for a child process that finds both packages too, with `variables` added."""
    given = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([*PACKAGES, given] if given else PACKAGES)
    return {**os.environ, "PYTHONPATH": paths, **variables}


def stop(process: subprocess.Popen, patience: float = 5.0) -> None:
    """Ends a child that leads its own process group, and all that it started; waits for it.

    It is asked first, so that it can end children that lead groups of their own.
    """
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass


def end_on_sigterm() -> None:
    """Makes SIGTERM end this process as an exception does, through its `finally` clauses."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
