"""Adapters off and eval mode for the reference: what PEFT and torch set, without their walks."""

import contextlib
import copy
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastdpo.adapters import reference_adapter
from fastdpo.reference_logps import evaluating
from fastdpo.switches import Switch
from tests.tiny import tiny_llama

CONFIGS = {
    "lora": {"target_modules": "all-linear", "lora_dropout": 0.5},
    "a saved module": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}
IDS = torch.arange(3, 9)[None]


def adapted(kind: str) -> nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **CONFIGS[kind])
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), copy.deepcopy(config))
    model.add_adapter("ref", config)
    return model.train()


def switch(model, adapter: str | None) -> Switch:
    @contextlib.contextmanager
    def plain():
        with evaluating(model), reference_adapter(model, adapter):
            yield

    return Switch(model, plain)


def state(model: nn.Module) -> list[dict]:
    return [dict(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("adapter", [None, "ref"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_switched_model_is_what_peft_makes_of_it(kind, adapter, monkeypatch):
    model = adapted(kind)
    made = switch(model, adapter)
    with torch.no_grad():
        with made.plain():
            expected = model(IDS).logits
        with made():  # watches
            assert torch.equal(model(IDS).logits, expected)
        before = state(model)
        if kind != "dora":  # whose layers clear a cache in train()
            monkeypatch.setattr(made, "plain", None)  # not needed any more
        with made():
            assert torch.equal(model(IDS).logits, expected)
            assert not model.training
        assert state(model) == before
        torch.manual_seed(1)
        assert not torch.equal(model(IDS).logits, expected)
    assert all(p.requires_grad == ("ref" not in n) for n, p in model.named_parameters()
               if "lora_" in n)  # fmt: skip


def test_a_layer_that_came_later_is_switched_too():
    model: Any = adapted("lora")
    made = switch(model, None)
    with made():
        pass
    layer: Any = model.get_submodule("base_model.model.model.layers.0.mlp")
    layer.add_module("later", nn.Dropout(0.5))
    with made():
        assert not layer.later.training
    assert layer.later.training


def test_a_switch_inside_eval_mode_or_after_it_holds():
    """Watched in eval mode, it must still leave training mode; and it restores what was there."""
    model = adapted("lora").eval()
    made = switch(model, None)
    with made():
        pass
    assert not any(module.training for module in model.modules())
    model.train()
    with made():
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_what_acts_on_its_mode_is_told_in_its_own_way():
    class Telling(nn.Linear):
        told = 0

        def train(self, mode: bool = True):
            self.told += 1
            return super().train(mode)

    model: Any = nn.Sequential(Telling(2, 2)).train()
    made = Switch(model, lambda: evaluating(model))
    told = model[0].told
    for _ in range(3):
        with made():
            assert not model.training
    assert model[0].told >= told + 6


def python_calls(context) -> int:
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        with context():
            pass
    finally:
        sys.setprofile(None)
    return calls


def test_a_switch_calls_next_to_nothing():
    """PEFT walks the model by name a dozen times; here every module is looked at once."""
    model = adapted("lora")
    made = switch(model, None)
    with made():
        pass
    n_modules = len(list(model.modules()))
    plain, ours = python_calls(made.plain), python_calls(made)
    print(f"\n{n_modules} modules: {plain} calls, {ours} of ours")
    assert plain > 20 * n_modules and ours < 3 * n_modules  # a generator's turn a module
