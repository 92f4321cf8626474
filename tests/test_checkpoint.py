"""Checkpoints: a resumed run equals the whole one bit for bit, or is refused; which ones are kept.

Kills, signals and full disks: test_resume.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastdpo import checkpoint as ckpt
from fastdpo.config import SHAPES_THE_RUN
from fastdpo.errors import CheckpointError
from fastdpo.loss_specs import SPECS
from tests.tiny import tiny_llama, tiny_pairs
from tests.tiny_trainer import LORA, trainer, weights


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stop_at", [3, 4])
def test_resume_is_bitwise_equal(tmp_path, lora, stop_at):
    """Stopped within an epoch (3 of 4 steps) or at its end (4), then resumed."""
    peft = {"peft_config": LoraConfig(**LORA)} if lora else {}
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7, "logging_steps": 2}
    whole = trainer(tmp_path / "whole", **peft, **options)
    whole.train()
    # The interrupted run is the whole one with everything after `stop_at` gone.
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    for step in range(stop_at + 1, 8):
        shutil.rmtree(tmp_path / "cut" / "run" / f"checkpoint-{step}")
    resumed = trainer(tmp_path / "cut", **peft, **options)
    metrics = resumed.train(resume_from_checkpoint=True).metrics
    n_pairs = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert n_pairs == pytest.approx(4 * (7 - stop_at))  # not those of the run before
    for (name, a), b in zip(
        weights(whole.model).items(), weights(resumed.model).values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.optimizer is not None and resumed.optimizer is not None
    for a, b in zip(
        whole.optimizer.state_dict()["state"].values(),
        resumed.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)
    timed = ("_per_second", "_runtime", "peak_memory", "waste")

    def exact(made):
        return [
            {key: value for key, value in log.items() if not any(t in key for t in timed)}
            for log in made.state.log_history
        ]

    assert exact(resumed) == exact(whole)
    file = tmp_path / "cut" / "run" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [
        log["step"] for log in whole.state.log_history
    ]


def test_resume_refuses_another_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **options).train()
    with pytest.raises(CheckpointError, match="beta: 0.1 then, 0.2 now"):
        trainer(tmp_path, beta=0.2, **options).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="train_dataset"):
        trainer(tmp_path, pairs=tiny_pairs(16, seed=9), **options).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(CheckpointError, match="does not exist"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_resume_refuses_another_adapter_or_dtype(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, peft_config=LoraConfig(**LORA), **options).train()
    for change, named in (
        ({"lora_alpha": 64}, "adapter lora_alpha: 8 then, 64 now"),
        ({"r": 8}, "adapter r: 4 then, 8 now"),
        ({"use_rslora": True}, "adapter use_rslora"),
    ):
        other = trainer(tmp_path, peft_config=LoraConfig(**{**LORA, **change}), **options)
        with pytest.raises(CheckpointError, match=named):
            other.train(resume_from_checkpoint=True)
    model = tiny_llama(dtype=torch.float64)
    with pytest.raises(CheckpointError, match="model:"):
        trainer(tmp_path, model=model, peft_config=LoraConfig(**LORA), **options).train(
            resume_from_checkpoint=True
        )


@pytest.mark.parametrize("kind", ["lora", "full", "ref_model"])
def test_resume_refuses_another_base_or_reference(tmp_path, kind):
    """Of the same shapes: what a checkpoint does not hold has to be brought along again."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    if kind == "lora":
        options["peft_config"] = LoraConfig(**LORA)
    models = [{"ref_model": tiny_llama(seed=n)} if kind == "ref_model" else {} for n in (1, 2)]
    if kind != "ref_model":  # the reference is the model that the run began with
        models = [{"model": tiny_llama(seed=n)} for n in (1, 2)]
    trainer(tmp_path, **models[0], **options).train()
    with pytest.raises(CheckpointError, match="base and reference weights: '.*' then, '.*' now"):
        trainer(tmp_path, **models[1], **options).train(resume_from_checkpoint=True)


def rewritten(folder: Path, change: Callable[[dict], None]) -> None:
    """The checkpoint as another fastdpo would have written it: its manifest changed, and whole."""
    file = folder / ckpt.STATE_FILE
    manifest = json.loads(file.read_text())
    del manifest["manifest"]
    change(manifest)
    manifest["sha256"]["moment.pt"] = ckpt._digest(folder / "moment.pt")
    file.write_text(json.dumps({**manifest, "manifest": ckpt._digest_of(manifest)}))


def test_a_checkpoint_of_an_earlier_fastdpo_resumes_with_a_warning(tmp_path, caplog):
    """What it could not record yet is named; an option that is not at its default is another run:
    without it the run would have been as at the default."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def run(folder, resume=None, **more):
        made = trainer(folder, peft_config=LoraConfig(**LORA), **options, **more)
        made.train(resume_from_checkpoint=resume)
        return weights(made.model)

    def older(manifest):
        manifest["fastdpo"] = "0.0.9"
        for key in ("base and reference weights", "lean_lora", "adapter use_dora"):
            del manifest["identity"][key]

    whole = run(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    rewritten(checkpoint, older)
    resumed = run(tmp_path, str(checkpoint))
    (said,) = [text for text in caplog.messages if "does not record" in text]
    assert "(0.0.9)" in said and "in another output_dir with the checkpoint as the model" in said
    assert "does not record: adapter use_dora, base and reference weights, lean_lora; " in said
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with pytest.raises(CheckpointError, match="lean_lora: None then, False now"):
        run(tmp_path, str(checkpoint), lean_lora=False)


def test_a_checkpoint_with_another_state_is_refused_whole(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **options).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    other = trainer(tmp_path, log_token_stats=True, **options)
    before = weights(other.model)
    with pytest.raises(CheckpointError, match="8 sums of metrics, 14 now.; set log_token_stats as"):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(other.model).items())
    moment = torch.load(checkpoint / "moment.pt", weights_only=False)
    del moment["sums"]["skipped steps"]
    torch.save(moment, checkpoint / "moment.pt")
    rewritten(checkpoint, lambda manifest: manifest.update(fastdpo="0.0.9"))
    with pytest.raises(CheckpointError, match="of fastdpo 0.0.9 counts .*no 'skipped steps'.;"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_whatever_a_loss_takes_shapes_the_run():
    taken = {name for spec in SPECS.values() for name in spec.parameters}
    assert taken and taken <= set(SHAPES_THE_RUN)
    assert "router_aux_loss_coef" in SHAPES_THE_RUN


def test_resume_follows_new_intervals(tmp_path):
    options = {"save_strategy": "steps", "max_steps": 6, "save_steps": 2, "logging_steps": 1}
    trainer(tmp_path, **options).train()
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    made = trainer(tmp_path, **{**options, "save_steps": 3, "logging_steps": 5})
    made.train(resume_from_checkpoint=True)
    assert [log["step"] for log in made.state.log_history if "loss" in log] == [1, 2, 5]
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    """It ended within an epoch (3 of its 4 steps); the rest of the epoch stays untrained."""
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = trainer(tmp_path, max_steps=3, **options)
    whole.train()
    resumed = trainer(tmp_path, max_steps=3, **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == 3
    for (name, a), b in zip(
        weights(whole.model).items(), weights(resumed.model).values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_torn_checkpoint_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, **options).train()
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged: optimizer.pt"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_checkpoints_rotate_and_the_best_stays(tmp_path):
    made = trainer(
        tmp_path,
        eval_dataset=tiny_pairs(4, seed=3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        max_steps=6,
        learning_rate=1.0,  # diverges: an early step is the best
    )
    made.train()
    best = made.state.best_model_checkpoint
    folders = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert len(folders) == 2 and best is not None
    evals = {log["step"]: log["eval_loss"] for log in made.state.log_history if "eval_loss" in log}
    assert made.state.best_global_step == min(evals, key=evals.__getitem__)
    assert f"checkpoint-{made.state.best_global_step}" in folders
    assert made.evaluate()["eval_loss"] == pytest.approx(min(evals.values()), rel=1e-5)
