"""The frozen base in fp8: what its layers compute, what it costs in log-probs, what is refused."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.errors import ConfigError, ModelError
from fastdpo.fp8 import FP8, Fp8Linear, _scaled_product, check_base_precision, quantize_rows

from .families import by_name
from .tiny import tiny_llama, tiny_pairs

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def test_rows_are_rounded_to_e4m3() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0
    rounded, scale = quantize_rows(x)
    assert rounded.dtype == FP8 and scale.shape == (40, 1)
    error = (rounded.float() * scale - x).abs()
    # 3 bits after the point: half a unit in the last place is 2^-4 of a number; below 2^-6 e4m3 is
    # subnormal, with steps of 2^-9 in units of the row's scale.
    assert (error <= 2.0**-4 * x.abs() + 2.0**-10 * scale * 1.001).all()
    assert torch.equal(rounded[3].float(), torch.zeros(64))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_what_is_rounded(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype).requires_grad_(False)
    layer = Fp8Linear(linear)
    x = torch.randn(2, 9, 64, dtype=dtype, requires_grad=True)
    out, grad = layer(x), torch.randn(2, 9, 48, dtype=dtype)
    out.backward(grad)
    assert out.dtype == dtype and x.grad is not None and x.grad.dtype == dtype

    weight = layer.weight.double() * layer.scale.double()
    x8, scale = quantize_rows(x.detach().flatten(0, 1))
    expected = (x8.double() * scale) @ weight.T + (linear.bias.double() if bias else 0)
    g8, scale = quantize_rows(grad.flatten(0, 1).float() * layer.scale.T)
    expected_grad = (g8.double() * scale) @ layer.weight.double()
    # Summed in fp32 over 64 terms, then rounded to the dtype, with a bias twice.
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.flatten(0, 1).double(), expected, rtol=eps, atol=2 * eps)
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), expected_grad, rtol=eps, atol=2 * eps)
    # And that is near the layer it came from: 64 terms err by 2^-4 / sqrt(3) each, twice.
    exact = linear(x)
    assert float((out - exact).norm() / exact.norm()) < 2.0**-4


@pytest.mark.parametrize("rows", [1, 9])
def test_the_kernel_takes_operands_of_any_strides(rows: int) -> None:
    """Gradients come transposed, too; and a single row's strides say nothing. The meta device
    checks what CUDA's kernel does, layouts included."""
    x = torch.randn(64, rows).T
    assert quantize_rows(x)[0].stride() == (64, 1)
    with torch.device("meta"):
        x, weight, scale = torch.empty(64, rows).T, torch.empty(48, 64, dtype=FP8), torch.empty(48)
        out = _scaled_product(*quantize_rows(x), weight, scale[:, None], torch.float16, True)
    assert out.shape == (rows, 48) and out.dtype == torch.float16


def test_the_emulation_is_torchs_own_product() -> None:
    a, b = torch.randn(32, 64), torch.randn(48, 64)
    (a8, scale_a), (b8, scale_b) = quantize_rows(a), quantize_rows(b)
    try:
        theirs = torch.ops.aten._scaled_mm(
            a8, b8.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"not on this CPU: {str(error).splitlines()[0]}")
    ours = _scaled_product(a8, scale_a, b8, scale_b, torch.bfloat16, False)
    # The same fp32 sum in another order, rounded to bf16.
    torch.testing.assert_close(theirs, ours, rtol=2.0**-7, atol=1e-5)


def config(tmp_path, **options) -> DPOConfig:
    return DPOConfig(
        output_dir=str(tmp_path / "run"),
        overwrite_output_dir=True,
        learning_rate=1e-2,
        max_steps=6,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{"base_precision": "fp8", **options},
    )


def test_a_run_on_an_fp8_base_learns_and_reports_its_error(tmp_path, caplog) -> None:
    model: Any = tiny_llama(intermediate_size=64, dtype=torch.bfloat16)
    pairs = tiny_pairs(16, pairs_per_prompt=2)
    n_before = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    with caplog.at_level("INFO", "fastdpo.fp8"):
        made = DPOTrainer(model, args=config(tmp_path), train_dataset=pairs, peft_config=LORA)
    assert "14 linear layers in fp8, emulated" in caplog.text
    assert made.fp8_error is not None and 0 < made.fp8_error < 1  # of log-probs of some 8 nat
    assert f"by {made.fp8_error:.2e} nat" in caplog.text
    frozen = [p for p in model.model.layers.parameters() if not p.requires_grad]
    n_after = sum(p.numel() * p.element_size() for p in frozen)
    assert n_after < 0.52 * n_before  # and a scale of 4 bytes a row
    assert model.lm_head.weight.dtype == torch.bfloat16
    made.train()
    logs = [log for log in made.state.log_history if "rewards/margins" in log]
    assert logs[0]["rewards/margins"] == 0  # the reference is the same base
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"]


def test_adapters_stay_as_they_are_frozen_or_not(tmp_path) -> None:
    """A reference's copy too, at a rank whose factors fp8 could hold."""
    config16 = LoraConfig(
        task_type="CAUSAL_LM", r=16, target_modules=["q_proj"], modules_to_save=["o_proj"]
    )
    model: Any = get_peft_model(tiny_llama(intermediate_size=64), config16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    args = config(tmp_path, reference="copy")
    made = DPOTrainer(model, args=args, train_dataset=tiny_pairs(16))
    in_fp8 = [n for n, module in made.model.named_modules() if isinstance(module, Fp8Linear)]
    assert in_fp8 and not any("lora_" in name or "modules_to_save" in name for name in in_fp8)
    made.train()  # whose first-step check finds the reference equal to the policy
    logs = [log for log in made.state.log_history if "rewards/margins" in log]
    assert logs[0]["rewards/margins"] == 0


def test_what_cannot_be_in_fp8_is_refused(tmp_path, monkeypatch) -> None:
    pairs = tiny_pairs(4)
    with pytest.raises(ConfigError, match="only an adapter can train; add use_peft: true"):
        DPOTrainer(tiny_llama(), args=config(tmp_path), train_dataset=pairs)
    odd = tiny_llama(hidden_size=24, intermediate_size=40, num_key_value_heads=1, head_dim=8)
    with pytest.raises(ModelError, match="no frozen linear layer with sizes in steps of 16"):
        DPOTrainer(odd, args=config(tmp_path), train_dataset=pairs, peft_config=LORA)
    fresh = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    gpt2 = by_name("GPT-2").build()
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no list of layers to convert; leave"):
        DPOTrainer(gpt2, args=config(tmp_path), train_dataset=pairs, peft_config=fresh)
    dora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True)
    with pytest.raises(ConfigError, match="fp8 and use_dora"):
        DPOTrainer(tiny_llama(), args=config(tmp_path), train_dataset=pairs, peft_config=dora)
    options: dict[str, Any] = {"base_precision": "4bit"}
    with pytest.raises(ConfigError, match="'4bit', and the model was loaded in float32; load it"):
        DPOTrainer(
            tiny_llama(), args=config(tmp_path, **options), train_dataset=pairs, peft_config=LORA
        )
    options = {"base_precision": None}
    made = DPOTrainer(
        tiny_llama(), args=config(tmp_path, **options), train_dataset=pairs, peft_config=LORA
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ModelError, match="needs compute capability 9.0 .* this is 8.9"):
        check_base_precision(made.model, "fp8", torch.device("cuda"))
