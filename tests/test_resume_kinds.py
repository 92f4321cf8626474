"""Whatever a run keeps between steps, a resumed one has: all that it leaves is bitwise the same.

test_resume.py kills runs of three kinds; here more kinds are cut after a checkpoint, in one
process.
"""

import json
import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.test_resume import exact, same
from tests.tiny import tiny_pairs
from tests.tiny_trainer import LORA, trainer, weights

PACKS = {"max_tokens_per_pack": 96}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
KINDS: dict[str, dict[str, Any]] = {
    "several packs": {**PACKS, "train_sampling_strategy": "random", "group_by_prompt": True},
    "lora": {"peft_config": LORA | {"lora_dropout": 0.2}, "disable_dropout": False,
             "first_step_check": False, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "dora, checkpointing": {"peft_config": LORA | {"use_dora": True, "lora_dropout": 0.2},
                            "disable_dropout": False, "first_step_check": False,
                            "gradient_checkpointing": "full"},
    "precomputed": {"precompute_ref_log_probs": True},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7},
    "moving adapter": {"peft_config": LORA, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "8-bit states": {"optim": "adamw_8bit"},
    "unfused, skip": {"optim": "adamw_torch", "on_nonfinite": "skip", **PACKS},
    "in backward": {"optimizer_in_backward": True, "max_grad_norm": 0.0},
    "best": {**EVALUATED, "save_total_limit": 1, "load_best_model_at_end": True},
    "whole step": {"loss_type": "aot", **PACKS},
    "bf16": {"bf16": True, "peft_config": LORA},
}  # fmt: skip


class Packs(TrainerCallback):
    """Which pairs each step's packs held."""

    def __init__(self, made: Any):
        self.seen: dict[int, list] = {}
        plain = made._train_step

        def noted(step: Any) -> None:
            number = made.state.global_step
            self.seen[number] = [pack.pair_ids.tolist() for pack in step.packs]
            plain(step)

        made._train_step = noted


def run(folder, options: dict[str, Any], resume: str | None = None) -> tuple[Any, Packs]:
    options = dict(options)
    if "peft_config" in options:
        options["peft_config"] = LoraConfig(**options["peft_config"])
    if "eval_strategy" in options:
        options["eval_dataset"] = {"near": tiny_pairs(4, seed=3), "far": tiny_pairs(4, seed=4)}
        options["metric_for_best_model"] = "near_loss"
    made = trainer(
        folder, pairs=tiny_pairs(14, pairs_per_prompt=2), max_steps=6, save_strategy="steps",
        save_steps=3, logging_steps=2, **options,
    )  # fmt: skip
    packs = Packs(made)
    made.train(resume_from_checkpoint=resume)
    return made, packs


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_whole_one(tmp_path, monkeypatch, kind):
    """Four steps an epoch: the resume is inside the first, and goes over into the second."""
    if "8-bit" in kind:
        pytest.importorskip("bitsandbytes", reason="the extra fastdpo[qlora] is not installed")
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)
    options = KINDS[kind]
    if "save_total_limit" in options:  # the checkpoint to go on from would be gone
        cut = {**options, "save_total_limit": None}
    else:
        cut = options
    whole, packs = run(tmp_path / "whole", cut)
    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    shutil.rmtree(tmp_path / "cut" / "run" / "checkpoint-6")
    resumed, later = run(tmp_path / "cut", cut, resume="auto")
    assert {**packs.seen, **later.seen} == packs.seen and set(later.seen) == {3, 4, 5}
    assert same(weights(resumed.model), weights(whole.model))
    states = [made.optimizer.state_dict() for made in (resumed, whole)]
    assert same(*states) and states[0]["state"]
    assert same(resumed.lr_scheduler.state_dict(), whole.lr_scheduler.state_dict())
    assert exact(resumed.state.log_history) == exact(whole.state.log_history)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").open()]
        for name in ("cut", "whole")
    ]
    assert exact(logs[0]) == exact(logs[1])
    assert resumed.state.best_metric == whole.state.best_metric
    assert resumed.pack_stats == whole.pack_stats
    if whole.args.sync_ref_model:
        ours, theirs = (dict(made.live_reference.model.named_parameters()) for made in
                        (resumed, whole))  # fmt: skip
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
