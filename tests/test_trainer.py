"""The loop: it learns, its gradient does not depend on packing, and a resume is bitwise equal."""

import contextlib
import copy
import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingPackageError,
    ModelError,
)
from tests.tiny import tiny_llama, tiny_mistral, tiny_pairs, tiny_rows, tiny_tokenizer

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


def config(tmp_path, **overrides) -> DPOConfig:
    options = {
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        **overrides,
    }
    return DPOConfig(**options)


def trainer(tmp_path, model=None, pairs=None, **overrides) -> DPOTrainer:
    init = {
        key: overrides.pop(key)
        for key in (
            *("ref_model", "peft_config", "callbacks", "eval_dataset", "optimizers"),
            "processing_class",
        )
        if key in overrides
    }
    return DPOTrainer(
        model=model if model is not None else tiny_llama(),
        args=config(tmp_path, **overrides),
        train_dataset=pairs if pairs is not None else tiny_pairs(16, pairs_per_prompt=2),
        **init,
    )


@contextlib.contextmanager
def hidden_package(name: str):
    """As if the package were not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        yield


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(made: DPOTrainer) -> list[float]:
    return [log["loss"] for log in made.state.log_history if "loss" in log]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_lowers_the_loss_and_raises_the_margin(tmp_path, loss_type, lora):
    peft_config = LoraConfig(**LORA) if lora else None
    made = trainer(
        tmp_path, peft_config=peft_config, loss_type=loss_type, max_steps=20, num_train_epochs=5
    )
    output = made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert output.global_step == 20 and len(logs) == 20
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert logs[-1]["rewards/margins"] > 0.1
    assert output.training_loss == pytest.approx(np.mean(losses(made)))


def test_first_sigmoid_loss_is_ln_2(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    assert losses(made)[0] == pytest.approx(np.log(2), abs=1e-6)


def run_weights(tmp_path, name, pairs, **overrides):
    made = trainer(tmp_path / name, pairs=pairs, model=tiny_llama(dtype=torch.float64), **overrides)
    made.train()
    return weights(made.model), losses(made)


def test_packing_does_not_change_the_run(tmp_path):
    """One pack, many packs, unshared prompts or padding: the same steps, in fp64.

    SGD, because Adam turns a gradient's rounding into a step of full size where it is near 0.
    """
    pairs = tiny_pairs(16, pairs_per_prompt=2)
    longest = int((pairs.lengths.sum(1)).max())
    common = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1}
    expected, expected_losses = run_weights(tmp_path, "one", pairs, **common)
    variants = {
        "many": {"max_tokens_per_pack": longest + 8},
        "unshared": {"packing_mode": "unshared"},
        "padded": {"packing_mode": "padded"},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "checkpointed": {"gradient_checkpointing": True},
        "reentrant": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    }
    for name, overrides in variants.items():
        got, got_losses = run_weights(tmp_path, name, pairs, **common, **overrides)
        # fp64 weights and log-probs; RMSNorm computes in fp32 whatever the model's dtype, which
        # leaves gradients equal to about 1e-6 relative (DESIGN 9), and four steps add up.
        np.testing.assert_allclose(got_losses, expected_losses, rtol=1e-6, err_msg=name)
        for key, value in expected.items():
            error = (got[key] - value).norm() / value.norm()
            assert error < 4e-6, (name, key, float(error))


@pytest.mark.parametrize("kind", ["copy", "precompute", "ref_model", "lora", "lora-precompute"])
def test_every_reference_of_the_initial_policy_gives_the_same_losses(tmp_path, kind):
    """The reference is the initial policy five ways; full fine-tuning and LoRA train apart."""
    sgd = {"optim": "sgd", "learning_rate": 0.1}  # Adam would blow rounding up where g is near 0
    options: dict = {"precompute_ref_log_probs": "precompute" in kind, **sgd}
    if "lora" in kind:
        options["peft_config"] = LoraConfig(**LORA)
        baseline = trainer(
            tmp_path / "base", peft_config=LoraConfig(**LORA), ref_model=tiny_llama(), **sgd
        )
    else:
        baseline = trainer(tmp_path / "base", ref_model=tiny_llama(), **sgd)
        if kind == "ref_model":
            options["ref_model"] = tiny_llama()
    baseline.train()
    made = trainer(tmp_path / "made", **options)
    made.train()
    # The same arithmetic up to the composition of packs; fp32 sums of up to 20 log-probs of
    # size 6 err by about 20 * 6 * 2^-24 = 7e-6 nat, the loss by beta times that.
    np.testing.assert_allclose(losses(made), losses(baseline), atol=2e-6)


def test_order_of_pairs(tmp_path):
    pairs = tiny_pairs(10)
    seen = []
    made = trainer(tmp_path, pairs=pairs, train_sampling_strategy="sequential", max_steps=5)
    original = made._train_step

    def spy(step):
        seen.append(sorted(i for pack in step.packs for i in pack.pair_ids.tolist()))
        original(step)

    made._train_step = spy
    made.train()
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3], [4, 5, 6, 7]]


def test_evaluate_names_and_values(tmp_path):
    """`evaluate` equals DPO computed by hand from separate forwards."""
    model, reference = tiny_llama(seed=1), tiny_llama(seed=2)
    pairs = tiny_pairs(6)
    made = DPOTrainer(
        model=model, ref_model=reference, args=config(tmp_path, beta=0.3), eval_dataset=pairs
    )
    metrics = made.evaluate()

    def logp(m, prompt, response):
        ids = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
        with torch.no_grad():
            token_logps = m(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        return token_logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()

    rewards = np.array(
        [
            [
                0.3 * (logp(model, pairs.prompt(i), r) - logp(reference, pairs.prompt(i), r))
                for r in (pairs.chosen(i), pairs.rejected(i))
            ]
            for i in range(len(pairs))
        ]
    )
    margins = rewards[:, 0] - rewards[:, 1]
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    assert metrics["eval_rewards/chosen"] == pytest.approx(rewards[:, 0].mean(), rel=1e-4)
    assert metrics["eval_rewards/rejected"] == pytest.approx(rewards[:, 1].mean(), rel=1e-4)
    assert metrics["eval_rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert metrics["eval_rewards/accuracies"] == (margins > 0).mean()
    assert {"eval_logps/chosen", "eval_logps/rejected", "eval_runtime"} <= metrics.keys()


def test_evaluation_during_training_on_several_sets(tmp_path):
    sets = {"near": tiny_pairs(4, seed=3), "far": tiny_pairs(4, seed=4)}
    made = trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    made.train()
    steps = [log["step"] for log in made.state.log_history if "eval_near_loss" in log]
    assert steps == [2, 4]
    assert all("eval_far_loss" in log for log in made.state.log_history if "eval_near_loss" in log)


def test_text_rows_end_to_end(tmp_path):
    made = DPOTrainer(
        model=tiny_llama(),
        args=config(tmp_path),
        train_dataset=tiny_rows(16),
        eval_dataset=tiny_rows(4, seed=1),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA),
    )
    made.train()
    assert made.evaluate()["eval_loss"] > 0
    stats = made.pack_stats
    assert stats.n_pairs == 16
    assert stats.n_tokens_necessary <= stats.n_tokens <= stats.n_tokens_unshared
    assert stats.n_tokens_unshared <= stats.n_tokens_padded


def test_metrics_file_and_curves(tmp_path):
    made = trainer(tmp_path)
    made.train()
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == made.state.log_history
    trl_names = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"}
    ours = {"pairs_per_second", "tokens_per_second", "waste", "peak_memory_gib"}
    rewards = {f"rewards/{key}" for key in ("chosen", "rejected", "accuracies", "margins")}
    assert trl_names | ours | rewards | {"logps/chosen", "logps/rejected"} <= lines[0].keys()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert DPOConfig.from_yaml(folder / "resolved_config.yaml").identity() == made.args.identity()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_saved_models_load_back(tmp_path, lora):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    made = trainer(
        tmp_path,
        model=str(tmp_path / "base"),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    made.processing_class = tiny_tokenizer()
    made.train()
    made.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / ("base" if lora else "saved"))
    if lora:
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "saved")
    ids = torch.arange(5, 25)[None]
    made.model.eval()
    expected: Any = made.model
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "</s>"


def test_a_trained_model_generates(tmp_path):
    made = trainer(tmp_path)
    made.train()
    ids = torch.arange(5, 15)[None]
    model: Any = made.model
    got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert got.shape[1] > ids.shape[1]


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
    resumed.train(resume_from_checkpoint=True)
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


def test_an_output_folder_is_never_overwritten(tmp_path):
    trainer(tmp_path).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="already holds an earlier run"):
        trainer(tmp_path).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(MissingPackageError, match="optim='adamw_8bit' needs a package"):
        with_8bit = trainer(tmp_path, overwrite_output_dir=True, optim="adamw_8bit")
        with hidden_package("bitsandbytes"):
            with_8bit.train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before  # refused before it clears
    trainer(tmp_path, overwrite_output_dir=True).train()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        trainer(tmp_path, output_dir=str(tmp_path / "other"), overwrite_output_dir=True).train()
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        trainer(tmp_path, output_dir=str(tmp_path / "file")).train()
    with pytest.raises(CheckpointError, match="can't be written"):
        trainer(tmp_path, output_dir="/dev/null/run").train()


def test_a_trained_adapter_needs_an_unambiguous_reference(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    fresh = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with pytest.raises(ConfigError, match="ambiguous"):
        trainer(tmp_path, model=copy.deepcopy(model))
    first = {}
    for name, policy, reference in (
        ("fresh", fresh, "auto"),
        ("copy", copy.deepcopy(model), "copy"),
        ("off", copy.deepcopy(model), "adapters_off"),
    ):
        made = trainer(tmp_path / name, model=policy, reference=reference, max_steps=2)
        made.train()
        first[name] = losses(made)[0]
        made.save_model(tmp_path / name / "saved")
        assert not (tmp_path / name / "saved" / "ref").exists()
    assert first["fresh"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["copy"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(first["off"] - np.log(2)) > 1e-3


def test_first_step_check_names_a_reference_that_is_not_the_policy(tmp_path):
    made = trainer(tmp_path)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(1.1)  # after the copy was taken
    with pytest.raises(ModelError, match="before the first update policy and reference differ"):
        made.train()
    unchecked = trainer(tmp_path, overwrite_output_dir=True, first_step_check=False)
    with torch.no_grad():
        unchecked.model.lm_head.weight.mul_(1.1)
    unchecked.train()


def test_callbacks_and_early_stopping(tmp_path):
    class Spy(TrainerCallback):
        events: list[str] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.events.append(f"step {state.global_step}")
            assert kwargs["model"] is not None and kwargs["optimizer"] is not None

        def on_train_end(self, args, state, control, **kwargs):
            self.events.append("end")

    made = trainer(
        tmp_path,
        callbacks=[Spy, EarlyStoppingCallback(early_stopping_patience=1)],
        eval_dataset=tiny_pairs(4, seed=3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/accuracies",
        greater_is_better=True,
        max_steps=50,
        learning_rate=0.0,  # nothing improves
    )
    made.train()
    assert Spy.events == ["step 1", "step 2", "end"]


def test_own_optimizer_and_scheduler(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    made = trainer(tmp_path, model=model, optimizers=(optimizer, scheduler))
    made.train()
    assert {log["learning_rate"] for log in made.state.log_history if "loss" in log} == {0.05}


def test_warmup_and_schedule_reach_the_log(tmp_path):
    made = trainer(tmp_path, max_steps=4, warmup_steps=2, learning_rate=1e-3)
    made.train()
    rates = [log["learning_rate"] for log in made.state.log_history if "loss" in log]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_clipping_bounds_the_update(tmp_path):
    model = tiny_llama()
    before = weights(model)
    made = trainer(
        tmp_path, model=model, optim="sgd", learning_rate=1.0, max_grad_norm=0.01, max_steps=1
    )
    made.train()
    squares = [(after - before[name]).pow(2).sum() for name, after in weights(model).items()]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(0.01, rel=1e-3)
    assert made.state.log_history[0]["grad_norm"] > 0.01


def test_bf16_autocast_trains(tmp_path):
    made = trainer(tmp_path, bf16=True, max_steps=6)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    assert all(p.dtype == torch.float32 for p in made.model.parameters())


def test_sliding_window_model_trains_with_shared_prompts(tmp_path):
    made = trainer(tmp_path, model=tiny_mistral(), max_steps=2)
    made.train()
    assert made.packed_forward.mode == "shared"


def test_errors_at_the_door(tmp_path):
    with pytest.raises(ConfigError, match="very object"):
        model = tiny_llama()
        trainer(tmp_path, model=model, ref_model=model)
    with pytest.raises(ModelError, match="does not exist"):
        trainer(tmp_path, model="./no/such/model")
    with pytest.raises(ModelError, match="q_projj.*did you mean 'q_proj'"):
        trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_projj"]))
    with pytest.raises(ModelError, match="k_prj.*matches no module"):  # though q_proj does
        trainer(
            tmp_path,
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_prj"]),
        )
    with pytest.raises(ModelError, match="rewrites the base weights"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA, init_lora_weights="pissa"))
    with pytest.raises(ModelError, match="400 tokens, ref_model's 300"):
        trainer(tmp_path, ref_model=tiny_llama(vocab_size=300))
    with pytest.raises(ConfigError, match="needs an adapter"):
        trainer(tmp_path, reference="adapters_off")
    with pytest.raises(DataError, match="needs an eval_dataset"):
        trainer(tmp_path).evaluate()
    with pytest.raises(ConfigError, match="there is no eval_dataset"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=1).train()
    with pytest.raises(DataError, match="max_tokens_per_pack"):
        trainer(tmp_path / "b", max_tokens_per_pack=8).train()


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


def test_a_model_given_by_name_trains_in_fp32(tmp_path):
    """bf16 weights would lose most updates of the default learning rate; TRL loads fp32 too."""
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    assert trainer(tmp_path, model=str(tmp_path / "base")).model.dtype == torch.float32


def test_overwriting_leaves_no_old_weights(tmp_path):
    first = trainer(tmp_path)
    first.train()
    first.save_model()
    second = trainer(tmp_path, peft_config=LoraConfig(**LORA), overwrite_output_dir=True)
    second.train()
    second.save_model()
    assert not list((tmp_path / "run").glob("model*.safetensors"))
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_options_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ModelError, match="lora_modules_to_save 'lmhead'.*did you mean 'lm_head'"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA, modules_to_save=["lmhead"]))
    with pytest.raises(ConfigError, match="gradient_checkpointing_kwargs has no 'use_reentrnt'"):
        trainer(
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrnt": True},
        )
    with pytest.raises(ConfigError, match="logps_impl='triton' can't run here"):
        trainer(tmp_path, logps_impl="triton")
    with pytest.raises(MissingPackageError, match=r"fastdpo\[trackers\]"):
        trainer(tmp_path, report_to="comet_ml")


def test_first_step_check_allows_for_fp32_norms_in_an_fp64_model(tmp_path):
    model = tiny_llama(dtype=torch.float64)
    trainer(tmp_path, model=model, precompute_ref_log_probs=True, max_steps=1).train()


def test_a_picture_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    made = trainer(tmp_path)

    class TakeThePlace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "run" / "curves.png").mkdir(exist_ok=True)

    made.add_callback(TakeThePlace())
    assert made.train().global_step == made.state.max_steps
    assert "curves.png could not be written" in caplog.text
