"""Reference log-probs on two real ranks: each computes its share, both end with all, and the cache
that they wrote together serves the next run whole."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdpo.reference_cache import stored_references
from tests.ranks import run_on_two_ranks
from tests.tiny import tiny_pairs
from tests.tiny_trainer import trainer

SCRIPT = """
import sys
import torch
from fastdpo import DPOConfig, DPOTrainer
from fastdpo.reference_logps import ModelReference
from tests.tiny import tiny_llama, tiny_pairs

folder = sys.argv[1]
forwards, token_logps = [], ModelReference.token_logps

def spy(self, packs):
    forwards.extend(packs)
    return token_logps(self, packs)

ModelReference.token_logps = spy
counts, values, losses = [], [], []
for run in ("first", "again"):
    args = DPOConfig(
        output_dir=f"{folder}/{run}", ref_cache_dir=f"{folder}/cache", max_tokens_per_pack=128,
        use_cpu=True, ddp_backend="gloo", max_steps=2, per_device_train_batch_size=2,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
        report_to="none",
    )
    trainer = DPOTrainer(
        model=tiny_llama(), args=args, train_dataset=tiny_pairs(24, pairs_per_prompt=2),
    )
    counts.append(len(forwards))
    forwards.clear()
    values.append(trainer.train_reference.logps)
    trainer.train()
    losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
torch.save((counts, values, losses), f"{folder}/{args.process_index}.pt")
"""


def test_two_ranks_compute_and_cache_together(tmp_path):
    run_on_two_ranks(SCRIPT, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    alone: Any = trainer(
        tmp_path / "alone",
        pairs=tiny_pairs(24, pairs_per_prompt=2),
        precompute_ref_log_probs=True,
        max_tokens_per_pack=128,
    )
    n_packs = alone.precomputations["train"].n_packs
    (first_0, again_0), (first_1, again_1) = (counts for counts, _, _ in results)
    assert (first_0, first_1) == ((n_packs + 1) // 2, n_packs // 2) and first_1 > 1
    assert again_0 == again_1 == 0
    for _, (first, again), losses in results:
        assert np.array_equal(first, results[0][1][0]) and np.array_equal(again, first)
        # The same packs in another process, perhaps with other threads: fp32 of size 10.
        assert np.abs(first - alone.train_reference.logps).max() < 1e-5
        assert losses[0] == losses[1]
    (stored,) = stored_references(Path(tmp_path / "cache"))
    assert stored.health.segments == 2 and stored.health.records == 48
    assert not (stored.health.damaged or stored.health.torn or stored.health.repeated)
