"""Several ranks: the pairs of a step are divided among them, and the run stays the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
import torch
from fastdpo import DPOConfig, DPOTrainer
from tests.tiny import tiny_llama, tiny_pairs

folder, batch, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
args = DPOConfig(
    output_dir=folder, use_cpu=True, ddp_backend=backend or None, max_steps=4, learning_rate=0.1,
    optim="sgd", per_device_train_batch_size=batch, gradient_checkpointing=False,
    logging_steps=1, save_strategy="no", disable_tqdm=True, report_to="none",
)
# 10 pairs in steps of 4: the last step of an epoch holds 2, one a rank; a step of 1 pair
# leaves a rank without any.
trainer = DPOTrainer(
    model=tiny_llama(dtype=torch.float64), args=args, train_dataset=tiny_pairs(9),
)
trainer.train()
if args.process_index == 0:
    torch.save(
        {"weights": trainer.model.state_dict(), "log": trainer.state.log_history},
        folder + "/result.pt",
    )
"""


def run(folder: Path, ranks: int, batch: int) -> dict:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT)
    backend = "gloo" if ranks > 1 else ""
    command = [sys.executable, str(script), str(folder), str(batch), backend]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={ranks}", *command[1:]]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt")


def test_two_ranks_train_as_one(tmp_path):
    one = run(tmp_path / "one", ranks=1, batch=4)
    two = run(tmp_path / "two", ranks=2, batch=2)
    for name, weight in one["weights"].items():
        # fp64 but for RMSNorm's fp32, whose gradients agree to about 1e-6 (DESIGN 9).
        assert (two["weights"][name] - weight).norm() <= 4e-6 * weight.norm(), name
    keys = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies")
    for a, b in zip(one["log"], two["log"], strict=True):
        for key in keys:
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-9), key
