"""Benchmarks and the GPU check; run them from the repository root: `python -m benchmarks.NAME`.

They need no installation: the two packages are found beside this folder. Nothing under fastdpo/,
kernels/ or tests/ imports from here, except the smoke tests.
"""

import os
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
