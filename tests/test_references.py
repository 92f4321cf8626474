"""Every kind of reference: the initial policy, an adapter, a model by name or in 4 bits."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastdpo import cli
from fastdpo.adapters import REFERENCE_ADAPTER
from fastdpo.config_files import write_yaml
from fastdpo.errors import ConfigError, MissingPackageError, ModelError
from tests.families import by_name
from tests.tiny import tiny_llama, tiny_pairs, tiny_rows, tiny_tokenizer
from tests.tiny_trainer import LORA, lora, losses, weights
from tests.tiny_trainer import trainer as dpo_trainer

trainer: Any = dpo_trainer  # what its references are is looked into here

pytestmark = pytest.mark.usefixtures("no_picture")


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


def test_a_reference_falls_back_with_its_policy(tmp_path):
    """To its own attention too, whichever was named for packs."""
    model = by_name("Mamba").build()
    made = trainer(
        tmp_path,
        model=model,
        pairs=tiny_pairs(8, vocab_size=80),
        attn_implementation="sdpa",
        max_steps=1,
    )
    assert made.packed_forward.mode == "padded" and made.packed_forward.backend == "eager"
    made.train()


# ---- adapters as references -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "shared"])
def test_a_reference_that_takes_no_packs_is_named_with_what_helps(tmp_path, mode):
    pairs = tiny_pairs(8, vocab_size=80)

    def train(packing_mode):
        models = {"model": by_name("Llama 3").build(), "ref_model": by_name("StableLM").build()}
        options = {"packing_mode": packing_mode, "max_steps": 1}
        dpo_trainer(tmp_path, pairs=pairs, **models, **options).train()

    with pytest.raises(ModelError, match="the reference, StableLmForCausalLM, can't do") as refused:
        train(mode)
    assert str(refused.value).endswith("; set packing_mode: padded for both models")
    train("padded")


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


def test_a_named_adapter_is_the_reference(tmp_path):
    base = tiny_llama()
    alone = lora(copy.deepcopy(base), std=0.1, seed=3, name="sft")
    policy = lora(lora(base, std=0.1, seed=3, name="sft"), std=0.1, seed=4, name="mine")
    policy.set_adapter("mine")
    frozen = [p for n, p in policy.named_parameters() if "lora_A.mine" in n]
    for parameter in frozen:  # the user's own choice, which switching adapters must not undo
        parameter.requires_grad_(False)
    by_model = trainer(tmp_path / "a", model=copy.deepcopy(policy), ref_model=alone, max_steps=3)
    by_name = trainer(tmp_path / "b", model=policy, reference="adapter:sft", max_steps=3)
    before = {n: p.clone() for n, p in policy.named_parameters() if ".sft." in n}
    by_model.train()
    by_name.train()
    assert losses(by_name) == losses(by_model)
    assert abs(losses(by_name)[0] - np.log(2)) > 1e-3
    assert not any(parameter.requires_grad for parameter in frozen)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)


def test_an_adapter_may_have_any_name(tmp_path):
    """One that no word makes up, and one that a module of the base model has too."""
    fresh = trainer(tmp_path / "a", model=lora(name="my-adapter"), max_steps=1)
    assert fresh.live_reference.adapter is None
    policy = lora(std=0.1, name="mlp")
    policy.add_adapter("my-adapter", LoraConfig(**LORA))
    policy.set_adapter("my-adapter")
    trained = weights(policy)
    assert sum(".mlp." in name for name in trained) > 4
    made = trainer(tmp_path / "b", model=policy, reference="adapter:mlp", max_steps=2)
    made.train()
    moved = weights(made.model)
    assert moved.keys() == trained.keys()
    assert all(not torch.equal(p, trained[n]) for n, p in moved.items() if "lora_B" in n)


def test_adapters_leave_no_doubt(tmp_path):
    def policy() -> Any:
        made = lora(lora(std=0.1, name="sft"), std=0.1, seed=1, name="mine")
        made.set_adapter("mine")
        return made

    for reference, parts in {
        "auto": ["'mine' was trained before", "'copy'", "'adapters_off'", "'adapter:sft'"],
        "adapter:stf": ["no such adapter", "did you mean 'sft'"],
        "adapter:mine": ["the adapter that is trained", "'copy'"],
    }.items():
        with pytest.raises(ConfigError) as caught:
            trainer(tmp_path, model=policy(), reference=reference)
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(ConfigError, match="needs an adapter"):
        trainer(tmp_path, reference="adapter:sft")
    several = policy()
    several.base_model.set_adapter(["sft", "mine"])
    with pytest.raises(ConfigError, match="2 active adapters"):
        trainer(tmp_path, model=several)
    named_ref = lora(lora(std=0.1, name=REFERENCE_ADAPTER), std=0.1, name="mine")
    named_ref.set_adapter("mine")
    assert trainer(tmp_path, model=named_ref).live_reference.adapter == REFERENCE_ADAPTER
    with pytest.raises(ConfigError, match="'ref'.*'adapter:ref'"):
        trainer(tmp_path, model=named_ref, reference="copy")
    with pytest.raises(ModelError, match="bias='all'.*biases of the base"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA, bias="all"))


# ---- from the command line --------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    for name, seed in (("model", 0), ("other", 1)):
        tiny_llama(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tiny_rows(8)))
    options = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "train.jsonl"),
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "save_strategy": "no",
    }
    write_yaml(folder / "config.yaml", options)
    return folder


def run(command: str, base: Path, *words: str) -> int:
    return cli.main([command, str(base / "config.yaml"), *words])


def test_precompute_then_train(base, tmp_path, capsys, forwards):
    cache = ("--ref_cache_dir", str(tmp_path / "cache"))
    assert run("precompute", base) == 2
    assert "--ref_cache_dir" in capsys.readouterr().err
    assert run("precompute", base, *cache) == 0
    shown = capsys.readouterr().out
    assert "train: 16 responses, 0 of them found; 1 of 1 packs computed" in shown
    forwards.clear()
    output = ("--output_dir", str(tmp_path / "run"))
    assert run("train", base, *cache, *output, "--beta", "0.4", "--use_peft", "--lora_r", "4") == 0
    assert forwards == []
    assert cli.main(["cache", "info", str(tmp_path / "cache")]) == 0
    shown = capsys.readouterr().out
    assert "1 reference," in shown and "16 responses" in shown and str(base / "model") in shown
    assert "float32, computed in float32" in shown


def test_a_reference_model_by_name(base, tmp_path, capsys, forwards):
    other = ("--ref_model_name_or_path", str(base / "other"))
    output = ("--output_dir", str(tmp_path / "run"), "--logging_steps", "1")
    assert run("train", base, *other, *output) == 0 and len(forwards) == 1
    (first, *_) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    made = trainer(
        tmp_path / "api",
        model=str(base / "model"),
        ref_model=str(base / "other"),
        pairs=tiny_rows(8),
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1e-6,
    )
    made.train()
    assert json.loads(first)["loss"] == pytest.approx(losses(made)[0], abs=1e-6)
    assert abs(losses(made)[0] - np.log(2)) > 1e-3
    assert run("train", base, "--ref_load_in_4bit", "--output_dir", str(tmp_path / "x")) == 2
    assert "'ref_load_in_4bit' needs" in capsys.readouterr().err


def test_a_reference_model_in_4_bits_is_asked_for_as_such(base, monkeypatch):
    """What bitsandbytes is asked to load, also where it is not installed."""
    from fastdpo import ModelConfig, model
    from fastdpo.config import DPOConfig

    args = DPOConfig(output_dir="unused", use_cpu=True)
    named: dict[str, Any] = {
        "model_name_or_path": "m",
        "ref_model_name_or_path": str(base / "other"),
    }
    quantized = ModelConfig(**named, ref_load_in_4bit=True, bnb_4bit_quant_type="fp4")
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(MissingPackageError, match="qlora"):
            model.load_ref_model(quantized, args)
        monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", object())
    asked = {}
    monkeypatch.setattr(model, "load_pretrained", lambda name, device, **kw: asked.update(kw))
    model.load_ref_model(quantized, args)
    assert asked["quantization_config"].load_in_4bit
    assert asked["quantization_config"].bnb_4bit_quant_type == "fp4"
    asked.clear()
    model.load_ref_model(ModelConfig(**named, use_peft=True, load_in_4bit=True), args)
    assert "quantization_config" not in asked  # the policy's quantization is not the reference's


def test_four_bits(tmp_path):
    """A 4-bit reference model; and QLoRA, whose adapters-off reference is served from the cache:
    the first-step check compares it with a policy that no reference forward came before."""
    pytest.importorskip("bitsandbytes", reason="the qlora extra")
    from fastdpo import ModelConfig, model
    from fastdpo.config import DPOConfig

    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny_llama(**wide).save_pretrained(tmp_path / "model")
    args = DPOConfig(output_dir="unused", use_cpu=True)
    name = str(tmp_path / "model")
    pairs = tiny_pairs(8)
    own = model.load_ref_model(
        ModelConfig(model_name_or_path=name, ref_model_name_or_path=name, ref_load_in_4bit=True),
        args,
    )
    made = trainer(tmp_path / "a", model=name, ref_model=own, pairs=pairs, max_steps=1)
    made.train()
    assert 1e-3 < abs(losses(made)[0] - np.log(2)) < 1  # 4 bits, and no other model

    gradients = []
    for run_name, found in (("b", 0), ("c", 16)):
        made = trainer(
            tmp_path / run_name,
            model=model.load_model(
                ModelConfig(model_name_or_path=name, use_peft=True, load_in_4bit=True), args
            ),
            peft_config=LoraConfig(**LORA),
            pairs=pairs,
            ref_cache_dir=str(tmp_path / "cache"),
            max_steps=1,
        )
        assert made.precomputations["train"].n_found == found
        made.train()
        gradients.append(made.state.log_history[0]["grad_norm"])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5) and gradients[0] > 0
