"""TR-DPO: the reference follows the policy, exactly or by averages, and a resumed run's too."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from fastdpo.adapters import REFERENCE_ADAPTER
from fastdpo.errors import ConfigError, ModelError
from fastdpo.reference_sync import RECOMPRESSION_TOLERANCE, recompress
from tests.tiny import tiny_llama, tiny_pairs
from tests.tiny_trainer import LORA, config, lora, losses, weights
from tests.tiny_trainer import trainer as dpo_trainer

trainer: Any = dpo_trainer  # what its references are is looked into here

pytestmark = pytest.mark.usefixtures("no_picture")


MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 2}


def test_full_weights_follow_as_in_trl(tmp_path):
    """The update is TRL's own, and the losses before the first one are those without."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    mine, other = tiny_llama(seed=1), tiny_llama(seed=2)
    made = trainer(tmp_path / "a", model=mine, ref_model=copy.deepcopy(other), max_steps=4, **MOVES)
    history = []
    move = made._move_reference

    def spy():
        step = made.state.global_step
        if step % 2 == 0:
            callbacks.SyncRefModelCallback._sync_target_model(made.model, other, 0.6)
        move()
        own = made.live_reference.model.parameters()
        history.append(all(torch.equal(a, b) for a, b in zip(own, other.parameters(), strict=True)))

    made._move_reference = spy
    made.train()
    assert history == [True] * 4
    still = trainer(tmp_path / "b", model=tiny_llama(seed=1), ref_model=tiny_llama(seed=2))
    still.train()
    assert losses(made)[:2] == losses(still)[:2] and losses(made)[2] != losses(still)[2]


def reference_equals_policy(made, pairs) -> bool:
    (pack,) = made.packer.packs(pairs, np.arange(len(pairs)))
    made.model.eval()
    with torch.no_grad():
        policy = made._forward(made.model, pack)
    (reference,) = made.live_reference.token_logps([pack])
    return torch.equal(policy, reference)


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "modules_to_save"])
def test_a_hard_update_is_exact(tmp_path, kind):
    peft = {
        "full": None,
        "lora": LoraConfig(**LORA),
        "dora": LoraConfig(**LORA, use_dora=True),
        "modules_to_save": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    }[kind]
    made = trainer(tmp_path, peft_config=peft, ref_model_mixup_alpha=1.0, max_steps=3, **MOVES)
    checks = []
    move = made._move_reference

    def spy():
        move()
        checks.append(reference_equals_policy(made, tiny_pairs(2)))
        made.model.train()

    made._move_reference = spy
    made.train()
    assert checks == [False, True, False]


def products(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: module.scaling[adapter]
        * module.lora_B[adapter].weight.double()
        @ module.lora_A[adapter].weight.double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_a_soft_update_of_lora_averages_products(tmp_path):
    made = trainer(tmp_path, peft_config=LoraConfig(**LORA), max_steps=12, **MOVES)
    expected = {name: torch.zeros_like(p) for name, p in products(made.model, "default").items()}
    move = made._move_reference
    worst = []

    def spy():
        move()
        if made.state.global_step % 2 == 0:
            for name, product in products(made.model, "default").items():
                expected[name] = 0.6 * product.detach() + 0.4 * expected[name]
            for name, own in products(made.model, REFERENCE_ADAPTER).items():
                error = (own - expected[name]).detach().norm()
                worst.append(float(error / expected[name].norm()))

    made._move_reference = spy
    made.train()
    # Each of the updates errs by at most the tolerance, old errors shrink by 0.4: a geometric sum.
    # Beside it fp32's rounding, 1e-6. The second bound: something was recompressed at all.
    assert max(worst) <= RECOMPRESSION_TOLERANCE / 0.6 + 1e-6
    ranks = [m.r[REFERENCE_ADAPTER] for m in made.model.modules() if hasattr(m, "lora_A")]

    assert 4 < max(ranks) < 6 * 4  # fewer than stacked
    made.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / REFERENCE_ADAPTER).exists()


def test_recompress():
    generator = torch.Generator().manual_seed(0)

    def factors(rank: int):
        shapes = ((40, rank), (rank, 30))
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    left, right = factors(5)
    doubled = torch.cat([left, left], 1), torch.cat([right, right])
    new_left, new_right = recompress(*doubled, 1e-6)
    assert new_left.shape == (40, 5) and new_right.shape == (5, 30)
    torch.testing.assert_close(new_left @ new_right, 2 * left @ right, rtol=1e-12, atol=1e-12)
    left, right = factors(60)  # more than either side has
    new_left, new_right = recompress(left, right, 1e-12)
    assert new_left.shape[1] == 30
    torch.testing.assert_close(new_left @ new_right, left @ right, rtol=1e-10, atol=1e-10)
    for tolerance in (0.5, 0.1, 0.01):
        new_left, new_right = recompress(left, right, tolerance)
        error = (new_left @ new_right - left @ right).norm() / (left @ right).norm()
        assert error <= tolerance
    zero_left, zero_right = recompress(torch.zeros(4, 3), torch.randn(3, 5), 1e-4)
    assert zero_left.shape == (4, 1) and not (zero_left @ zero_right).any()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_has_the_moved_reference(tmp_path, kind):
    options = {
        "peft_config": LoraConfig(**LORA) if kind == "lora" else None,
        "save_strategy": "steps",
        "save_steps": 3,  # between two moves
        "max_steps": 6,
        **MOVES,
    }
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, a), b in zip(
        weights(whole.model).items(), weights(resumed.model).values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    "options, match",
    [
        ({**MOVES, "precompute_ref_log_probs": True}, "'sync_ref_model'.*'precompute_ref_log"),
        ({**MOVES, "ref_cache_dir": "x"}, "'sync_ref_model'.*'ref_cache_dir'"),
        ({**MOVES, "reference": "adapters_off"}, "'sync_ref_model'.*'adapters_off'.*'copy'"),
        ({**MOVES, "reference": "adapter:a"}, "'sync_ref_model'.*'adapter:a'"),
        ({"ref_model_mixup_alpha": 0.5}, "'ref_model_mixup_alpha'.*sync_ref_model"),
        ({"ref_model_sync_steps": 5}, "'ref_model_sync_steps'.*sync_ref_model"),
        ({**MOVES, "ref_model_mixup_alpha": 0}, "'ref_model_mixup_alpha'.*> 0 and <= 1"),
        ({**MOVES, "ref_model_mixup_alpha": 1.5}, "'ref_model_mixup_alpha'.*<= 1"),
        ({"reference": "adaptr:a"}, "'reference'.*adapter:NAME"),
        ({"reference": "adapter:"}, "'reference'.*adapter:NAME"),
        ({"reference": "cpoy"}, "'reference'.*did you mean 'copy'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_options(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        config(tmp_path, **options)


def test_references_that_cannot_follow(tmp_path):
    soft = {**MOVES, "ref_model_mixup_alpha": 0.5}
    with pytest.raises(ConfigError, match="DoRA.*ref_model_mixup_alpha: 1"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA, use_dora=True), **soft)
    targets = {"target_modules": ["embed_tokens", "q_proj"]}
    with pytest.raises(ConfigError, match="LoRA on embeddings.*embed_tokens"):
        trainer(tmp_path, peft_config=LoraConfig(**{**LORA, **targets}), **soft)
    with pytest.raises(ModelError, match="averages weights.*layers.2"):
        trainer(tmp_path, ref_model=tiny_llama(num_hidden_layers=3), **MOVES)
    with pytest.raises(ConfigError, match="leave ref_model out"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA), ref_model=tiny_llama(), **MOVES)
    with pytest.raises(ConfigError, match="ambiguous"):
        trainer(tmp_path, model=lora(std=0.1), **MOVES)
