"""A script on two real ranks of this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_on_two_ranks(script: str, folder: Path) -> None:
    """Runs `script`, whose one argument is `folder`, under torchrun; fails with its last words."""
    file = folder / "script.py"
    file.write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")])
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", str(file), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
