"""The loop: it learns, the same however steps are packed; what it takes from users and refuses."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data_pairs import TokenizedPairs
from fastdpo.errors import ConfigError, DataError, MissingPackageError, ModelError
from tests.tiny import tiny_llama, tiny_mistral, tiny_pairs, tiny_rows, tiny_tokenizer
from tests.tiny_trainer import LORA, config, losses, trainer, weights


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


def test_what_older_scripts_pass_is_sent_to_its_place(tmp_path):
    makes: Any = DPOTrainer
    common = {"model": tiny_llama(), "train_dataset": tiny_rows(2)}
    with pytest.raises(ConfigError, match="'beta' is an option of DPOConfig, not of DPOTrainer"):
        makes(**common, args=config(tmp_path), beta=0.1)
    with pytest.raises(ConfigError, match="'tokenizer'; its name is processing_class"):
        makes(**common, args=config(tmp_path), tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match="'max_prompt_length'; its name is max_length"):
        makes(**common, args=config(tmp_path), max_prompt_length=8)
    with pytest.raises(ConfigError, match="args is a TrainingArguments.*DPOConfig"):
        makes(**common, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


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


def test_a_model_given_by_name_trains_in_fp32(tmp_path):
    """bf16 weights would lose most updates of the default learning rate; TRL loads fp32 too."""
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    assert trainer(tmp_path, model=str(tmp_path / "base")).model.dtype == torch.float32


def test_options_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ModelError, match="lora_modules_to_save 'lmhead'.*did you mean 'lm_head'"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA, modules_to_save=["lmhead"]))
    with pytest.raises(ConfigError, match="gradient_checkpointing_kwargs has no 'use_reentrnt'"):
        trainer(
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrnt": True},
        )
    with pytest.raises(ConfigError, match="no effect where gradient_checkpointing is off"):
        config(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="logps_impl='triton' can't run here"):
        trainer(tmp_path, logps_impl="triton")
    with pytest.raises(MissingPackageError, match="'comet_ml'.*pip install comet_ml"):
        trainer(tmp_path, report_to="comet_ml")


def test_a_picture_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    made = trainer(tmp_path)

    class TakeThePlace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "run" / "curves.png").mkdir(exist_ok=True)

    made.add_callback(TakeThePlace())
    assert made.train().global_step == made.state.max_steps
    assert "curves.png could not be written" in caplog.text


def test_a_token_the_model_lacks_is_named_by_its_row(tmp_path) -> None:
    pairs = TokenizedPairs.from_lists(
        [[1], [2], [3]], [[4, 5], [6], [7]], [[8], [9, 90], [7, 8]], rows=[10, 11, 12]
    )
    says = r"train row 11: token id 90, .* embeddings for \[0, 80\); use its own tokenizer"
    with pytest.raises(DataError, match=says):
        trainer(tmp_path, tiny_llama(vocab_size=80), pairs)
    made = trainer(tmp_path, tiny_llama(vocab_size=91), pairs)
    beyond = TokenizedPairs.from_lists([[1]], [[91]], [[2]])
    with pytest.raises(DataError, match="eval row 0: token id 91"):
        made.evaluate(beyond)
