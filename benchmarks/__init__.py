"""Benchmarks and the GPU check; run them from the repository root: `python -m benchmarks.NAME`.

They need no installation: the two packages are found beside this folder. Nothing under fastdpo/,
kernels/ or tests/ imports from here, except the smoke tests.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for _folder in (ROOT, ROOT / "kernels" / "torch-ext"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
