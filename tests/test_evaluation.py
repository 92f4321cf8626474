"""Evaluations: their names, their values, and when they are made."""

import numpy as np
import pytest
import torch

from fastdpo import DPOTrainer
from tests.tiny import tiny_llama, tiny_pairs
from tests.tiny_trainer import config, trainer


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
