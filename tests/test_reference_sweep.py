"""After the first run a sweep makes no forward pass but the policy's own, counted at the model.

test_precompute.py counts what references are asked for; here every call of every decoder counts,
so that no path around them stays unseen.
"""

from typing import Any

import pytest
from peft import LoraConfig
from transformers.models.llama.modeling_llama import LlamaModel

from fastdpo.loss_specs import LOSSES, SPECS
from tests.tiny import tiny_llama, tiny_pairs
from tests.tiny_trainer import LORA
from tests.tiny_trainer import trainer as dpo_trainer

trainer: Any = dpo_trainer

pytestmark = pytest.mark.usefixtures("no_picture")

N_STEPS = 2
READS_REFERENCE = [n for n, spec in SPECS.items() if not (spec.reference_free or spec.unpaired)]
SWEPT: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in READS_REFERENCE},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "mix": {"loss_type": "sigmoid,bco_pair,sft", "loss_weights": [0.8, 0.2, 1.0]},
    "beta": {"beta": 0.4},
    "rates": {"learning_rate": 1e-5, "weight_decay": 0.1, "warmup_steps": 1, "optim": "sgd"},
    "order": {"seed": 7, "group_by_prompt": True},
    "ld": {"ld_alpha": 0.3},
    "f": {"f_divergence_type": "js_divergence"},
    "wpo": {"use_weighting": True, "rpo_alpha": 0.5},
    "room": {"max_length": 64},  # cuts nothing
    "lora": {"peft_config": LoraConfig(**LORA)},
}


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """An entry for every forward pass of every Llama."""
    seen: list[int] = []
    original = LlamaModel.forward

    def counted(self, *args, **kwargs):
        seen.append(id(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return seen


def made_and_trained(tmp_path, passes: list[int], **options: Any) -> tuple[int, int]:
    """Forward passes while the trainer is made, and while it trains."""
    passes.clear()
    pairs = tiny_pairs(8, pairs_per_prompt=2)
    made = trainer(tmp_path, pairs=pairs, max_steps=N_STEPS, **options)
    at_start = len(passes)
    made.train()
    assert made.state.global_step == N_STEPS
    return at_start, len(passes) - at_start


def test_a_sweep_runs_the_policy_alone(tmp_path, passes):
    cache = {"ref_cache_dir": str(tmp_path / "cache")}
    # The load-time proof takes some passes; a loss without a reference, no others.
    alone = {
        "plain": made_and_trained(tmp_path / "simpo", passes, loss_type="simpo"),
        "lora": made_and_trained(
            tmp_path / "simpo-lora", passes, loss_type="simpo", peft_config=LoraConfig(**LORA)
        ),
    }
    assert {trained for _, trained in alone.values()} == {N_STEPS}
    live = made_and_trained(tmp_path / "live", passes)
    assert live[1] == 2 * N_STEPS  # the count sees a reference: one more pass a step
    first = made_and_trained(tmp_path / "first", passes, **cache)
    assert first[0] > alone["plain"][0] and first[1] == N_STEPS
    for name, options in SWEPT.items():
        found = made_and_trained(tmp_path / name, passes, **cache, **options)
        assert found == alone["lora" if name == "lora" else "plain"], name
    # It can fail: another weight is another reference.
    other = made_and_trained(tmp_path / "other", passes, **cache, model=tiny_llama(seed=1))
    assert other[0] > alone["plain"][0]


def test_every_loss_of_pairs_that_reads_a_reference_is_swept():
    assert set(READS_REFERENCE) < set(SWEPT) and len(READS_REFERENCE) == len(LOSSES) - 5
