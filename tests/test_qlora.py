"""Bases in 4 and 8 bits, and the adapters on them. bitsandbytes' kernels are those of its CPU
build here; on a GPU nothing of this is measured yet."""

from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import fastdpo.model
from fastdpo import DPOConfig, DPOTrainer, ModelConfig
from fastdpo.adapters import add_adapter, lora_config
from fastdpo.config_files import write_yaml
from fastdpo.errors import ConfigError, ModelError
from fastdpo.export import export
from fastdpo.model import load_model
from fastdpo.plan import state_bytes
from fastdpo.plan_replay import quantized_bytes
from tests.tiny import tiny_llama, tiny_pairs

# bitsandbytes' CPU kernels take blocks of 64: widths are multiples of that.
SHAPE: Any = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(**SHAPE).save_pretrained(path)
    return str(path)


def config(tmp_path, **options) -> DPOConfig:
    base = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_tokens_per_pack": 200,
    }
    return DPOConfig(**{**base, **options})


def trainer_of(tmp_path, folder: str, model: dict[str, Any], **options) -> DPOTrainer:
    args = config(tmp_path, **options)
    named = ModelConfig(model_name_or_path=folder, **{"use_peft": True, "lora_r": 4, **model})
    return DPOTrainer(
        model=load_model(named, args),
        args=args,
        train_dataset=tiny_pairs(16),
        peft_config=lora_config(named),
    )


def losses(trainer: DPOTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# ---- quantized bases --------------------------------------------------------------------------

QUANTIZED = {
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "8bit": {"load_in_8bit": True},
    "dora": {"load_in_4bit": True, "use_dora": True},  # in bf16 its off and on differ by rounding
    "rslora": {"base_precision": "4bit", "use_rslora": True, "lora_layers_to_transform": "1"},
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_base_trains_its_adapter(tmp_path, folder, kind):
    """Shared packs, as the probe finds them exact; margins of 0 at first; the base stays."""
    pytest.importorskip("bitsandbytes")
    trainer = trainer_of(tmp_path, folder, QUANTIZED[kind])
    assert trainer.packed_forward.mode == "shared"
    assert isinstance(trainer.model, PeftModel)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    held = {p.dtype for n, p in before.items() if n.endswith(("proj.weight", "layer.weight"))}
    assert held == {torch.int8 if kind == "8bit" else torch.uint8}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-6)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".lora_" in name for name in moved)


@pytest.mark.parametrize("bits", [4, 8])
def test_packs_of_a_quantized_base_equal_separate_sequences(tmp_path, folder, bits):
    """Steps in shared packs and in unshared ones are the same up to fp32's rounding: a row of an
    8-bit layer does not look at the rows beside it."""
    pytest.importorskip("bitsandbytes")
    runs = []
    for mode in ("shared", "unshared"):
        trainer = trainer_of(
            tmp_path / mode, folder, {f"load_in_{bits}bit": True}, packing_mode=mode
        )
        trainer.train()
        runs.append(losses(trainer))
    # Log-probs of some 100 nat a pair, to fp32's 6e-8 times a few; Adam's first steps enlarge that.
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "nested", "8bit", "dora", "nf4 of an older fastdpo"])
def test_a_merged_export_is_the_model_that_was_trained(tmp_path, folder, kind, caplog):
    """Over the weights that the quantized ones stand for: those of the base as it is saved give
    other logits by far. A run in Python has them on record too; an older one's command line has
    its options."""
    pytest.importorskip("bitsandbytes")
    older = "older" in kind
    options = {**QUANTIZED[kind.split()[0]], "dtype": "float32"}
    trainer = trainer_of(tmp_path, folder, options, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    if older:
        names = {"model_name_or_path": folder, "use_peft": True}
        write_yaml(tmp_path / "run" / "resolved_config.yaml", {**names, **options})
        (tmp_path / "run" / "base.json").unlink()
    export(tmp_path / "run", tmp_path / "merged", merge=True, dtype="float32")
    assert "no record" not in caplog.text
    assert not (tmp_path / "merged" / "base.json").exists()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    assert not any(
        type(module).__module__.startswith("bitsandbytes") for module in merged.modules()
    )
    bare: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        trained, ours, base = (
            m.eval()(input_ids=ids).logits for m in (trainer.model, merged, bare)
        )
    # Two layers in fp32, whose products are summed in another order: some tens of roundings.
    assert float((ours - trained).abs().max()) <= 1e-4 * float(trained.abs().max())
    assert float((base - trained).abs().max()) >= 1e-2 * float(trained.abs().max())


@pytest.mark.parametrize("kind", ["nf4", "nested", "8bit"])
def test_quantized_weights_take_the_bytes_that_plans_count(tmp_path, folder, kind):
    pytest.importorskip("bitsandbytes")
    options: Any = QUANTIZED[kind]
    named = ModelConfig(model_name_or_path=folder, use_peft=True, **options)
    model = load_model(named, config(tmp_path))
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    held = layer.weight.nbytes
    if kind == "8bit":
        held += layer.weight.SCB.nbytes
    else:
        state = layer.weight.quant_state
        held += state.absmax.nbytes + state.code.nbytes
        if state.nested:
            held += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    bits = 8 if kind == "8bit" else 4
    assert quantized_bytes(64, 128, bits, kind == "nested") == held


def test_the_plan_of_a_quantized_base_holds(tmp_path, folder):
    """Within 10 % of what PyTorch's dispatcher sees allocated."""
    pytest.importorskip("bitsandbytes")
    trainer = trainer_of(
        tmp_path, folder, {"load_in_4bit": True}, gpu_memory="1GiB", measure_memory=True
    )
    trainer.train()
    assert trainer.run_plan is not None
    planned, peak = trainer.run_plan.prediction.peak, trainer.run_plan.measured_peak
    assert peak is not None and abs(planned - peak) <= 0.1 * peak


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit"])
def test_8_bit_states_are_as_large_as_planned(tmp_path, folder, optim):
    pytest.importorskip("bitsandbytes")
    trainer = trainer_of(tmp_path, folder, {"lora_r": 32}, optim=optim)
    trainer.train()
    assert trainer.optimizer is not None
    sizes = [(p.numel(), p.nbytes) for p in trainer.model.parameters() if p.requires_grad]
    assert any(n >= 4096 for n, _ in sizes) and any(n < 4096 for n, _ in sizes)
    held = sum(
        value.nbytes
        for state in trainer.optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")
    )
    assert held == state_bytes(optim, sizes)[0]


# ---- adapters -----------------------------------------------------------------------------------


def test_all_linear_with_chosen_layers(tmp_path, folder):
    trainer = trainer_of(tmp_path, folder, {"lora_layers_to_transform": [1]})
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert names and all(".layers.1." in name for name in names)
    assert not any("lm_head" in name for name in names)
    assert len({name.split(".lora_")[0] for name in names}) == 7  # every projection of the layer
    trainer.train()


@pytest.mark.parametrize(
    "layers, error, message",
    [
        ([2], ModelError, "lora_layers_to_transform 2 is no layer of .*0 to 1"),
        ([0.5], ConfigError, "whole numbers from 0 on"),
        ([-1], ConfigError, "whole numbers from 0 on"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers, error, message):
    options: Any = {"use_peft": True, "lora_layers_to_transform": layers}
    with pytest.raises(error, match=message):
        peft_config = lora_config(ModelConfig(model_name_or_path="m", **options))
        assert peft_config is not None
        add_adapter(tiny_llama(), peft_config)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused_by_name(kind):
    peft_config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ModelError, match=f"{peft_config.peft_type.value} prepends virtual tokens"):
        add_adapter(tiny_llama(), peft_config)


def test_prompt_learning_loaded_from_a_folder_is_refused_by_name(tmp_path, folder):
    model: Any = tiny_llama(**SHAPE)
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    learner: Any = get_peft_model(model, peft_config)
    learner.peft_config["default"].base_model_name_or_path = folder
    learner.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="prepends virtual tokens"):
        DPOTrainer(
            model=str(tmp_path / "prompt"), args=config(tmp_path), train_dataset=tiny_pairs(8)
        )


def test_a_checkpoint_of_an_adapter_is_a_model_that_is_trained_on(tmp_path, folder):
    """Its base comes with it; the reference is the adapter as it was, not the bare base."""
    first = trainer_of(tmp_path / "first", folder, {})
    first.train()
    first.save_model(tmp_path / "adapter")
    second = DPOTrainer(
        model=str(tmp_path / "adapter"),
        args=config(tmp_path / "second", reference="copy"),
        train_dataset=tiny_pairs(16),
    )
    ours = {n: p for n, p in second.model.named_parameters() if p.requires_grad}
    theirs = dict(first.model.named_parameters())
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)
    second.train()
    assert losses(second)[0] == pytest.approx(0.693147, abs=1e-6)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base_precision": "4bit"}, "'base_precision' is that of frozen weights"),
        (
            {"base_precision": "4bit", "load_in_8bit": True, "use_peft": True},
            "'base_precision' '4bit' and 'load_in_8bit' contradict each other",
        ),
    ],
)
def test_base_precision_that_contradicts_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(model_name_or_path="m", **options)


class CountUnpacked(TorchDispatchMode):
    """Operations of bitsandbytes that unpack a whole 4-bit weight, or multiply by it."""

    n = 0

    def also(self, weight):
        self.n += 1
        return weight

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.n += "gemm_4bit" in name or "dequantize_4bit" in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("how, passes", [("none", 3 - 3 / 14), ("full", 4)])
def test_a_weight_is_unpacked_once_a_pack_and_pass(
    tmp_path, folder, monkeypatch, bits, how, passes
):
    """Once for the reference, once forward, once backward, and once more where the forward is
    computed again: however many pairs a pack holds, and LoRA or no. So large packs pay for it."""
    pytest.importorskip("bitsandbytes")
    unpacked = CountUnpacked()
    if bits == 8:  # ours, see model.keep_activations
        plain = fastdpo.model._unpacked
        monkeypatch.setattr(fastdpo.model, "_unpacked", lambda *a: unpacked.also(plain(*a)))
    per_pack = []
    for pairs, tokens in ((2, 2000), (8, 2000)):
        trainer = trainer_of(
            tmp_path / f"{pairs}",
            folder,
            {f"load_in_{bits}bit": True},
            per_device_train_batch_size=pairs,
            max_tokens_per_pack=tokens,
            gradient_checkpointing=how,
            max_steps=2,
        )
        unpacked.n = 0
        with unpacked:
            trainer.train()
        n_layers = sum(
            type(m).__module__ == "bitsandbytes.nn.modules" for m in trainer.model.modules()
        )
        assert n_layers == 14
        per_pack.append(unpacked.n / 2 / n_layers)  # two steps of one pack
    # Of 14 weights the first layer's q, k and v want no gradient of their input, unless it is made
    # to, as transformers does for checkpointing.
    assert per_pack[0] == per_pack[1] == pytest.approx(passes)
