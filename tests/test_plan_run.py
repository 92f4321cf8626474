"""What a run does with its plan: writes and compares it, packs again where memory runs out, keeps
its packs on resume. The plan itself: test_plan.py."""

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.packing import longest_pair
from fastdpo.plan_device import Device
from tests.test_plan import LORA, SHAPE, config, some_pairs
from tests.tiny import tiny_llama, tiny_pairs


def test_a_run_writes_its_plan_and_compares_it(tmp_path, caplog):
    caplog.set_level("INFO", logger="fastdpo")
    trainer = DPOTrainer(
        model=tiny_llama(**SHAPE),
        args=config(tmp_path, max_tokens_per_pack="auto", gpu_memory="1GiB", measure_memory=True),
        train_dataset=some_pairs(),
        peft_config=LoraConfig(**LORA),
    )
    assert isinstance(trainer.args.max_tokens_per_pack, int)
    trainer.train()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["auto"] == ["max_tokens_per_pack"]
    assert plan["chosen"]["max_tokens_per_pack"] == trainer.args.max_tokens_per_pack
    assert plan["total_bytes"] <= plan["budget_bytes"] == 2**30
    # The dispatcher sees all but what kernels borrow inside, on the packs that were planned for.
    planned = plan["first_steps_peak_bytes"]
    assert abs(plan["measured_peak_bytes"] - planned) <= 0.1 * planned <= 0.1 * plan["peak_bytes"]
    lines = [
        record.message for record in caplog.records if "at the peak of the first" in record.message
    ]
    assert len(lines) == 1


def test_a_budget_too_small_for_a_pair_is_named_before_step_1(tmp_path):
    with pytest.raises(DataError, match="its pair of .* tokens can't fit"):
        DPOTrainer(
            model=tiny_llama(**SHAPE),
            args=config(tmp_path, max_tokens_per_pack="auto", gpu_memory="4MiB"),
            train_dataset=some_pairs(),
            peft_config=LoraConfig(**LORA),
        )


class OutOfMemoryOnce:
    """Stands for the policy's forward: the n-th call finds no memory, after real work was done."""

    def __init__(self, forward, at: int):
        self.forward, self.at, self.calls = forward, at, 0

    def __call__(self, *args):
        return self.with_stats(*args, ()).token_logps

    def with_stats(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory (a stub)")
        return self.forward.with_stats(*args)


def trained(tmp_path, name: str, out_of_memory_at: int = 0, **options):
    trainer = DPOTrainer(
        model=tiny_llama(),
        args=config(tmp_path, output_dir=str(tmp_path / name), **options),
        train_dataset=tiny_pairs(24),
    )
    if out_of_memory_at:
        short: Any = OutOfMemoryOnce(trainer._forward, out_of_memory_at)
        trainer._forward = short
    trainer.train()
    return trainer


def test_out_of_memory_before_the_first_update_packs_again(tmp_path, caplog):
    """And the run is, bit for bit, the one that had the smaller packs from the start."""
    caplog.set_level("WARNING", logger="fastdpo")
    short = trained(tmp_path, "a", out_of_memory_at=2, max_tokens_per_pack=200, max_steps=3)
    tokens = short.args.max_tokens_per_pack
    assert isinstance(tokens, int) and tokens < 200
    assert "packing again with max_tokens_per_pack" in caplog.text
    other = trained(tmp_path, "b", max_tokens_per_pack=tokens, max_steps=3)
    weights = (short.model.state_dict(), other.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (short, other)]
    assert losses[0] == losses[1]


def test_out_of_memory_later_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ModelError, match=r"out of memory at step [23],.*lower max_tokens_per_pack"):
        trained(tmp_path, "a", out_of_memory_at=5, max_tokens_per_pack=300, max_steps=3)


def test_out_of_memory_on_the_longest_pair_alone_names_its_row(tmp_path):
    pairs = tiny_pairs(24)
    _, tokens = longest_pair(pairs, "shared")
    with pytest.raises(ModelError, match=rf"row \d+ alone takes {tokens}: lower max_length"):
        trained(tmp_path, "a", out_of_memory_at=1, max_tokens_per_pack=tokens)


def test_a_resumed_run_keeps_the_packs_that_it_had(tmp_path):
    """Where they were the plan's choice, or made smaller: its steps are then the same ones."""

    def made(**options: Any) -> DPOTrainer:
        args = config(tmp_path, max_tokens_per_pack="auto", gpu_memory="1GiB", **options)
        return DPOTrainer(model=tiny_llama(), args=args, train_dataset=tiny_pairs(24))

    first = made(save_strategy="steps", save_steps=1)
    first.train()
    path = tmp_path / "run" / "plan.json"
    plan = json.loads(path.read_text())
    assert plan["chosen"]["max_tokens_per_pack"] != 150
    path.write_text(json.dumps({**plan, "repacked_to": [200, 150]}))
    second = made(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    second.train()
    assert second.packer.max_tokens == second.plan.packer.max_tokens == 150


def test_auto_without_a_budget_is_the_usual_value(tmp_path):
    names = ("gradient_checkpointing", "activation_offloading", "optim", "logps_workspace_bytes")
    given = config(tmp_path, **dict.fromkeys((*names, "max_tokens_per_pack"), "auto"))
    assert DPOConfig(**given.to_dict()).to_dict() == given.to_dict()
    trainer = DPOTrainer(model=tiny_llama(), args=given, train_dataset=tiny_pairs(24))
    assert trainer.run_plan is None and given.optim == "auto"  # the caller's own is left alone
    assert [getattr(trainer.args, name) for name in names] == [
        *(True, False, "adamw_torch_fused", 2**28)
    ]
    assert trainer.args.max_tokens_per_pack == trainer.packer.max_tokens == 8192
    trainer.train()


@pytest.mark.parametrize(
    "value, settled", [("full", True), ("none", False), ("selective", "selective"), (True, True)]
)
def test_checkpointing_has_words(tmp_path, value, settled):
    made = config(tmp_path, gradient_checkpointing=value)
    assert made.gradient_checkpointing == settled
    assert DPOConfig(**made.to_dict()).gradient_checkpointing == settled
    with pytest.raises(ConfigError, match="auto or none or selective or full.*did you mean"):
        config(tmp_path, gradient_checkpointing="selectiv")


def test_a_model_that_can_not_be_replayed_is_trained_all_the_same(tmp_path, monkeypatch, caplog):
    """On a GPU, where a plan is made unasked; where a budget was asked for, it is an error."""

    def fails(*_: Any) -> None:
        raise RuntimeError("a router that reads numbers")

    gpu = Device("a GPU", True, 2**40)
    monkeypatch.setattr("fastdpo.plan_run.present_device", lambda device: gpu)
    monkeypatch.setattr("fastdpo.plan_replay.decoder_output", fails)
    options: Any = {"max_tokens_per_pack": "auto"}
    trainer = DPOTrainer(
        model=tiny_llama(), args=config(tmp_path, **options), train_dataset=tiny_pairs(24)
    )
    assert trainer.run_plan is None and trainer.args.max_tokens_per_pack == 8192
    assert "no plan for LlamaForCausalLM" in caplog.text and "a router that reads" in caplog.text
    with pytest.raises(ModelError, match="no plan for LlamaForCausalLM"):
        DPOTrainer(
            model=tiny_llama(),
            args=config(tmp_path, gpu_memory="1GiB", **options),
            train_dataset=tiny_pairs(24),
        )
