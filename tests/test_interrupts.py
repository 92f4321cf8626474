"""SIGTERM to a run of two ranks: both stop after the same step, and its checkpoint is whole."""

from typing import Any

import torch

from tests.ranks import run_on_two_ranks
from tests.test_resume import exact, same

SCRIPT = """
import os
import signal
import sys
import time
from pathlib import Path
import torch
from transformers import TrainerCallback
from fastdpo import DPOConfig, DPOTrainer, saving
from fastdpo.checkpoint import check_whole
from fastdpo.interrupts import Interrupted
from tests.tiny import tiny_llama, tiny_pairs

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
save_model = saving.save_model

def slow_save(*args):  # whoever does not wait for it is done before it is
    time.sleep(0.5)
    save_model(*args)

saving.save_model = slow_save

class Signal(TrainerCallback):
    def __init__(self, ranks):
        self.ranks = ranks

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and rank in self.ranks:
            os.kill(os.getpid(), signal.SIGTERM)

def run(name, ranks=(), **options):
    args = DPOConfig(
        output_dir=str(folder / name), use_cpu=True, ddp_backend="gloo", max_steps=8,
        learning_rate=0.01, per_device_train_batch_size=2, gradient_checkpointing=False,
        disable_tqdm=True, report_to="none", lr_scheduler_type="linear",
        **{"logging_steps": 4, "save_strategy": "no", **options},
    )
    trainer = DPOTrainer(
        model=tiny_llama(), args=args, train_dataset=tiny_pairs(10), callbacks=[Signal(ranks)],
    )
    found = {"status": 0}
    try:
        trainer.train(resume_from_checkpoint="auto")
    except Interrupted as error:
        check_whole(Path(args.output_dir) / f"checkpoint-{trainer.state.global_step}")
        found["status"] = error.status
    return found | {
        "step": trainer.state.global_step,
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "log": list(trainer.state.log_history),
    }

results = {"whole": run("whole")}
for name, ranks, options in (
    ("both", (0, 1), {}),
    ("one", (1,), {}),
    ("at a checkpoint", (0,), {"save_strategy": "steps", "save_steps": 5, "logging_steps": 100}),
):
    results[name] = run(name, ranks, **options)
    results[name + ", resumed"] = run(name, (), **options)
torch.save(results, folder / f"{rank}.pt")
"""


def test_a_signal_stops_all_ranks_after_one_step(tmp_path):
    run_on_two_ranks(SCRIPT, tmp_path)
    ranks: list[dict[str, Any]] = [
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    ]
    for name, step in (("both", 4), ("one", 4), ("at a checkpoint", 5)):
        saved = {path.name for path in (tmp_path / name).glob("checkpoint-*")}
        assert saved - {"checkpoint-8"} == {f"checkpoint-{step}"}
        for results in ranks:
            whole, stopped, resumed = (results[key] for key in ("whole", name, f"{name}, resumed"))
            assert (stopped["status"], stopped["step"]) == (143, step), name
            assert (resumed["status"], resumed["step"]) == (0, 8)
            assert same(resumed["weights"], whole["weights"])
            assert same(resumed["optimizer"], whole["optimizer"])
            assert not same(stopped["weights"], whole["weights"])
            if name != "at a checkpoint":  # which logs nothing but its end
                assert exact(resumed["log"]) == exact(whole["log"])
    assert same(ranks[0]["whole"]["weights"], ranks[1]["whole"]["weights"])
