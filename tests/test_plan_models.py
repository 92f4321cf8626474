"""The plan of what is not a plain model: mixtures of experts, an fp8 base, an adapter on the head,
models that can't be made shallower; and that it never loads a weight."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import JambaConfig, LlamaConfig, MixtralConfig, MixtralForCausalLM

from fastdpo.batch import Pack
from fastdpo.cli import main
from fastdpo.packing import build_pack
from fastdpo.plan_replay import StepSettings, TwinSpec, build_twin, replay, weight_bytes
from tests.test_plan import LORA, SHAPE, beyond_weights, run_measured, some_pairs
from tests.tiny import tiny_llama

HEADS: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS: Any = {**SHAPE, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}


def some_pack() -> Pack:
    return build_pack(some_pairs(), range(12), mode="shared")


# ---- experts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora, checkpointing", [(False, False), (True, True)])
def test_experts_are_planned(tmp_path, lora, checkpointing):
    """Grouped products hold as many rows wherever they are routed, so that no route is assumed."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**EXPERTS))
    trainer, peak = run_measured(tmp_path, model, lora, gradient_checkpointing=checkpointing)
    assert trainer.run_plan is not None
    assert abs(beyond_weights(trainer.run_plan.prediction) - peak) <= 0.1 * peak


def test_experts_are_planned_in_bf16_and_fp32_for_a_gpu():
    config = MixtralConfig(**EXPERTS)
    found = {
        dtype: replay(TwinSpec(config, dtype), some_pack(), StepSettings(cuda=True, triton=True))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert found[torch.bfloat16].total < found[torch.float32].total
    # Two experts a token, three products each, forward and twice backward; checkpointed: again.
    n, (d, inner) = some_pack().n_tokens, (SHAPE["hidden_size"], SHAPE["intermediate_size"])
    experts = SHAPE["num_hidden_layers"] * 2 * 3 * 2 * n * d * inner
    assert found[torch.float32].flops == found[torch.bfloat16].flops >= 4 * experts


def test_a_model_that_can_not_be_made_shallower_is_replayed_as_deep_as_it_is():
    """Its layers' kinds follow from other options of its config."""
    shape: Any = {**SHAPE, **HEADS, "num_hidden_layers": 2}
    del shape["head_dim"]
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
    more: Any = {"expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}
    config = JambaConfig(**shape, **periods, **more, use_mamba_kernels=False)
    pack = build_pack(some_pairs(), range(2), mode="padded")
    found = replay(TwinSpec(config, torch.float32), pack, StepSettings(padded=True))
    assert found.total > 0


# ---- an fp8 base --------------------------------------------------------------------------------


def test_an_fp8_base_is_a_byte_an_element_and_a_scale_a_row():
    config = LlamaConfig(**SHAPE)
    lora = LoraConfig(**LORA)
    bf16, _ = weight_bytes(build_twin(TwinSpec(config, torch.bfloat16, lora)))
    fp8, _ = weight_bytes(build_twin(TwinSpec(config, torch.bfloat16, lora, fp8=True)))
    d, inner, heads = 64, 160, (32 * 16, 32 * 16)  # LlamaConfig has 32 heads, here of width 16
    sizes = [(d, heads[0]), *[(d, heads[1])] * 2, (heads[0], d), *[(d, inner)] * 2, (inner, d)]
    saved = sum(n_in * n_out - 4 * n_out for n_in, n_out in sizes)
    assert bf16 - fp8 == SHAPE["num_hidden_layers"] * saved


def test_an_fp8_base_is_planned(tmp_path):
    trainer, peak = run_measured(tmp_path, tiny_llama(**SHAPE), True, base_precision="fp8")
    assert trainer.run_plan is not None
    predicted = trainer.run_plan.prediction
    assert abs(beyond_weights(predicted) - peak) <= 0.1 * peak
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    held = sum(tensor.nbytes for tensor in tensors)
    assert predicted.memory["weights"] + predicted.memory["adapters"] == held
    assert predicted.making > held  # it was whole at first


def test_an_fp8_base_on_a_gpu_runs_its_kernel_not_the_emulation():
    """Whose products are at the full rate of fp32; the kernel's, at twice that of bf16, count half,
    and LoRA's own in full."""
    spec = TwinSpec(LlamaConfig(**SHAPE), torch.bfloat16, LoraConfig(**LORA), fp8=True)
    settings: Any = {"bf16": True, "flash": True, "triton": True, "workspace_bytes": 2**20}
    kernel, emulation = [
        replay(spec, some_pack(), StepSettings(cuda=cuda, **settings)) for cuda in (True, False)
    ]
    assert 0.5 * emulation.flops < kernel.flops < 0.7 * emulation.flops


# ---- an adapter on the head ---------------------------------------------------------------------


def test_an_adapter_on_the_head_is_planned(tmp_path, monkeypatch):
    targets = ["q_proj", "down_proj", "lm_head"]
    monkeypatch.setitem(LORA, "target_modules", targets)
    trainer, peak = run_measured(tmp_path, tiny_llama(**SHAPE), True)
    assert trainer.run_plan is not None
    predicted = trainer.run_plan.prediction
    assert abs(beyond_weights(predicted) - peak) <= 0.1 * peak
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert predicted.memory["adapters"] == trained
    assert any("lm_head.lora_B" in name for name, _ in trainer.model.named_parameters())


# ---- the command --------------------------------------------------------------------------------


def test_the_command_reads_a_config_and_no_weight(tmp_path, monkeypatch, capsys):
    """The folder holds a config alone, and whoever would load weights is not to be called."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan loads no weights")

    shape: Any = {**SHAPE, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    shape |= {"num_hidden_layers": 32, "head_dim": 128, "num_key_value_heads": 8}
    config = LlamaConfig(**shape)
    config.save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    for name in ("safetensors.torch.load_file", "torch.load"):
        monkeypatch.setattr(name, refused)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refused)
    words = ["plan", "--model_name_or_path", str(tmp_path / "model"), "--gpu_memory", "24GiB"]
    words += ["--use_peft", "--max_length", "512", "--max_tokens_per_pack", "2048"]
    # 6.98e9 weights in linear layers, of a byte, or half of one and 4 bytes for 64; 1.05e9 of two
    # in embeddings and head.
    for precision, weights in {"fp8": "8.46 GiB", "4bit": "5.61 GiB"}.items():
        assert main([*words, "--base_precision", precision]) == 0
        printed = capsys.readouterr().out
        line = next(line for line in printed.splitlines() if "  weights" in line)
        assert weights in line, printed
        assert f"base_precision: {precision}" in printed
        assert ("before step 1" in printed) == (precision == "fp8")


LLAMA_1B: Any = {
    **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64},
    **{"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tie_word_embeddings": True,
}


def test_full_fine_tuning_of_1b_in_16_gib_takes_8_bit_states(tmp_path, capsys):
    """1.236e9 parameters: 4.6 GiB of fp32 weights, as many gradients, twice that of states."""
    LlamaConfig(**LLAMA_1B).save_pretrained(tmp_path / "1B")
    words = ["plan", "--model_name_or_path", str(tmp_path / "1B"), "--gpu_memory", "16GiB"]
    words += ["--dtype", "float32", "--optim", "auto", "--gradient_checkpointing", "auto"]
    words += ["--max_length", "512", "--precompute_ref_log_probs", "true"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "optim: adamw_8bit  # chosen" in printed or "optim: paged_adamw_8bit  #" in printed
    rows = [line.split() for line in printed.splitlines() if line.endswith(" GiB")]
    found = {" ".join(row[:-2]): float(row[-2]) for row in rows}
    assert found["weights"] == 4.6 and found["total"] <= 16
    assert found["optimizer states"] < 4.6 * 2 / 3
