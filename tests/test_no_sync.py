"""Between two logs no step waits for the device, as far as a CPU can show it: nothing is read.

On a GPU test_gpu.py holds the same steps to `set_sync_debug_mode("error")`. Padded batches are left
out: transformers, which builds their masks, reads them.
"""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.no_reads import no_reads
from tests.tiny import tiny_pairs
from tests.tiny_trainer import LORA, trainer

PACKS = {"max_tokens_per_pack": 96}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "several packs": PACKS,
    "lora, adapters off": {"peft_config": LoraConfig(**LORA), **PACKS},
    "lora, copied reference": {"peft_config": LoraConfig(**LORA), "reference": "copy"},
    "dora": {"peft_config": LoraConfig(**LORA, use_dora=True)},
    "dropout": {"peft_config": LoraConfig(**LORA, lora_dropout=0.1), "disable_dropout": False,
                "first_step_check": False},
    "precomputed": {"precompute_ref_log_probs": True, **PACKS},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "skip": {"on_nonfinite": "skip", **PACKS},
    "in backward": {"optimizer_in_backward": True, "max_grad_norm": 0.0},
    "checkpointing": {"gradient_checkpointing": "full", **PACKS},
    "token stats": {"log_token_stats": True},
    "whole step": {"loss_type": "aot", **PACKS},
    "mixed losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], **PACKS},
    "own packs": {"packing_mode": "unshared", **PACKS},
}  # fmt: skip


class Watch(TrainerCallback):
    """Refuses reads in the steps after the first, which checks what it starts from, and that do
    not log."""

    def __init__(self) -> None:
        self.watched, self.inside = 0, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= 1:
            self.inside = no_reads()
            self.inside.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self.inside is not None:
            self.inside.__exit__(None, None, None)
            self.inside = None
            self.watched += 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_between_logs(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)
    watch = Watch()
    pairs = tiny_pairs(16, pairs_per_prompt=2)
    made = trainer(tmp_path, pairs=pairs, callbacks=[watch], logging_steps=4, **KINDS[kind])
    try:
        made.train()
    finally:
        if watch.inside is not None:
            watch.inside.__exit__(None, None, None)
    assert watch.watched == 3
    if KINDS[kind].get("max_tokens_per_pack"):
        assert made.pack_stats.n_packs > 4


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: torch.repeat_interleave(torch.ones(3, dtype=torch.long)),
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.long)),
        lambda x: x.nonzero(),
        lambda x: torch.unique(x),
        lambda x: x.__setitem__(x > 0, torch.ones(3)),
    ],
)
def test_reads_are_seen(read):
    with pytest.raises(AssertionError, match="would wait for a GPU"), no_reads():
        read(torch.ones(3))
    with no_reads():
        torch.where(torch.ones(3) > 0, 1.0, torch.ones(3)).masked_fill_(torch.ones(()) > 0, 0.0)
