"""Runs jobs in forks of one warm process, so that killing a run costs no start of Python.

Reads one JSON job a line from stdin. For each: forks, prints the child's pid, waits, prints the
child's exit status (negative: the signal that killed it). What a job runs is below.
"""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer, cli
from fastdpo import checkpoint as ckpt
from fastdpo import trainer as trainer_module
from fastdpo.errors import FastDPOError
from fastdpo.run_folder import prepare_output_dir
from tests.tiny import tiny_llama, tiny_pairs

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
# Everything that a resume could get wrong: dropout's randomness, several packs a step, a moving
# reference, evaluation by epochs, a best checkpoint, early stopping's patience.
KINDS: dict[str, dict[str, Any]] = {
    "full": {"max_tokens_per_pack": 96, "eval_strategy": "epoch", "metric_for_best_model": "loss"},
    "lora": {"peft": LORA | {"lora_dropout": 0.2}, "disable_dropout": False},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 3, "optim": "adamw_torch"},
}


class Watch(TrainerCallback):
    """Notes the packs of every step, and does what the job says after a step."""

    def __init__(self, folder: Path, job: dict[str, Any]):
        self.folder, self.job = folder, job

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.job.get("signal_after"):
            os.kill(os.getpid(), getattr(signal, self.job["signal"]))
        if state.global_step == self.job.get("full_after"):  # the next big file does not fit
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))


def train(job: dict[str, Any]) -> int:
    folder = Path(job["folder"])
    options = dict(KINDS[job["kind"]])
    peft = options.pop("peft", None)
    config = DPOConfig(
        output_dir=str(folder / "run"), max_steps=10, learning_rate=1e-2, use_cpu=True,
        per_device_train_batch_size=4, logging_steps=2, save_strategy="steps", save_steps=1,
        save_total_limit=2, disable_tqdm=True, report_to=["none"], gradient_checkpointing=False,
        first_step_check=options.get("disable_dropout", True), **options,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=tiny_llama(),
        args=config,
        train_dataset=tiny_pairs(14, pairs_per_prompt=2),
        eval_dataset=tiny_pairs(6, seed=3),
        peft_config=LoraConfig(**peft) if peft else None,
        callbacks=[Watch(folder, job)],
    )
    plain = trainer._train_step

    def noted(step):
        ids = [pack.pair_ids.tolist() for pack in step.packs]
        with (folder / "packs.jsonl").open("a") as file:
            file.write(json.dumps([trainer.state.global_step, ids]) + "\n")
        plain(step)

    trainer._train_step = noted
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(folder / "result")
    return 0


def crash(job: dict[str, Any]) -> int:
    """Writes checkpoint-2 over and over, killed at its first, second, … touch of the file system;
    after each a whole checkpoint is left, and after the last the new one."""
    folder = Path(job["folder"])
    state = ckpt.ResumeState(
        trainer_state=ckpt.TrainerState(), optimizer={"w": torch.ones(3)}, scheduler={},
        rng={"python": None}, sums={}, identity={},
    )  # fmt: skip
    weights = lambda draft: (draft / "w.bin").write_bytes(bytes(100))  # noqa: E731
    for n in range(1, 200):
        run = folder / str(n)
        prepare_output_dir(run, resuming=False, overwrite=False)
        names = ["checkpoint-1", "checkpoint-2"] if job["again"] else ["checkpoint-1"]
        for name in names:
            ckpt.save_checkpoint(run / name, state, weights)
        child = os.fork()
        if child == 0:
            _exit_at_event(n, str(run))
            ckpt.save_checkpoint(run / "checkpoint-2", state, weights)
            ckpt.rotate(run, 1, run / "checkpoint-2", None)
            os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        prepare_output_dir(run, resuming=True, overwrite=False)
        found = ckpt.candidates(run, "true")
        kept, _ = ckpt.load_newest(found)
        assert not [path for path in run.iterdir() if path.name.startswith(".")], n
        assert not done or [path.name for path in found] == ["checkpoint-2"]
        if done:
            assert n > 15, "the hook saw too little"
            return 0
    raise AssertionError("it never came to an end")


def _exit_at_event(n: int, where: str) -> None:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        seen += event != "open" or where in str(arguments[0])
        if seen == n:
            os._exit(9)

    sys.addaudithook(hook)


def run(job: dict[str, Any]) -> int:
    cli._run = lambda argv: globals()[job["do"]](job)  # the command line's own exit statuses
    try:
        return cli.main([])
    except FastDPOError:
        raise
    except BaseException:
        traceback.print_exc()
        return 70


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer_module.plot_curves = lambda *args: None  # a third of so short a run
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os._exit(run(job))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
