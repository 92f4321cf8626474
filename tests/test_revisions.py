"""Revisions of the hub: which one of a model, its reference, an adapter and its base is loaded."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fastdpo import ModelConfig
from fastdpo.adapters import add_adapter, lora_config
from fastdpo.config_files import write_yaml
from fastdpo.errors import ConfigError
from fastdpo.export import export
from fastdpo.model import base_model, load_model, load_ref_model
from tests.tiny import tiny_llama
from tests.tiny_trainer import LORA, bare_config

SEEDS = {"main": 1, "sft": 2}  # what tells the revisions of a base apart


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache as the hub's client leaves it, offline: me/base and me/other with two branches."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for branch, seed in SEEDS.items():
        tiny_llama(seed=seed).save_pretrained(place(tmp_path / "hub", "me/base", branch))
        tiny_llama(seed=10 + seed).save_pretrained(place(tmp_path / "hub", "me/other", branch))
    return tmp_path / "hub"


def place(hub: Path, name: str, branch: str) -> Path:
    """The folder of that branch, which may be filled."""
    repository = hub / f"models--{name.replace('/', '--')}"
    commit = f"{sorted(SEEDS).index(branch) + 1:x}" * 40
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def seed_of(model: Any) -> int:
    """Which of the models above `model` is, or is built on."""
    seeds = (*SEEDS.values(), *(10 + seed for seed in SEEDS.values()))
    embedding: Any = base_model(model).get_input_embeddings()
    others: dict[int, Any] = {seed: tiny_llama(seed=seed).get_input_embeddings() for seed in seeds}
    (seed,) = (
        seed for seed, other in others.items() if torch.equal(embedding.weight, other.weight)
    )
    return seed


def test_model_and_reference_are_of_the_revision_asked_for(hub):
    args = bare_config()
    cases: list[tuple[dict[str, Any], int, int]] = [
        ({"ref_model_name_or_path": "me/base"}, 1, 1),
        ({"ref_model_name_or_path": "me/base", "model_revision": "sft"}, 2, 2),
        # A branch of one repository means nothing in another.
        ({"ref_model_name_or_path": "me/other", "model_revision": "sft"}, 2, 11),
        ({"ref_model_name_or_path": "me/other", "ref_model_revision": "sft"}, 1, 12),
        (
            {"ref_model_name_or_path": "me/base", "model_revision": "sft"}
            | {"ref_model_revision": "main"},
            2,
            1,
        ),
    ]
    for options, policy, reference in cases:
        config = ModelConfig(**{"model_name_or_path": "me/base", **options})
        assert seed_of(load_model(config, args)) == policy, options
        assert seed_of(load_ref_model(config, args)) == reference, options
    with pytest.raises(ConfigError, match="'ref_model_revision' needs a reference model"):
        ModelConfig(model_name_or_path="me/base", ref_model_revision="sft")


def test_an_adapter_remembers_the_revision_of_its_base(hub, tmp_path):
    config = ModelConfig(
        model_name_or_path="me/base", model_revision="sft", use_peft=True, dtype="float32"
    )
    base, new = load_model(config, bare_config()), lora_config(config)
    assert not isinstance(base, PeftModel) and new is not None
    made = add_adapter(base, new)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    made.save_pretrained(str(tmp_path / "run"))
    again = load_model(ModelConfig(model_name_or_path=str(tmp_path / "run")), bare_config())
    assert isinstance(again, PeftModel) and seed_of(again) == SEEDS["sft"]
    merged = made.merge_and_unload()
    export(tmp_path / "run", tmp_path / "out", merge=True, dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name]), name


def test_a_run_whose_adapter_names_no_revision_is_merged_by_its_options(hub, tmp_path):
    base = AutoModelForCausalLM.from_pretrained("me/base")
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(str(tmp_path / "run"))
    options = {"model_name_or_path": "me/base", "model_revision": "sft"}
    write_yaml(tmp_path / "run" / "resolved_config.yaml", options)
    export(tmp_path / "run", tmp_path / "out", merge=True, dtype="float32")
    assert seed_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == SEEDS["sft"]


def test_an_adapter_of_the_hub_is_trained_on(hub):
    """Not a model whose adapter is frozen and whose base is trained, as transformers loads it."""
    base = AutoModelForCausalLM.from_pretrained("me/base", revision="sft")
    adapter = get_peft_model(base, LoraConfig(**LORA, revision="sft"))
    for branch in SEEDS:
        adapter.save_pretrained(str(place(hub, "me/adapter", branch)))
    for branch in SEEDS:
        config = ModelConfig(model_name_or_path="me/adapter", model_revision=branch)
        model = load_model(config, bare_config())
        assert isinstance(model, PeftModel) and seed_of(model) == SEEDS["sft"]
        assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
