"""LoRA on the output head: packed log-probs and gradients are those of PEFT's padded forward."""

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from fastdpo.errors import ModelError
from fastdpo.head import head_lora
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack

from .test_keystone import padded_unshared
from .tiny import tiny_llama, tiny_pairs

V = 80


def adapted(dtype: torch.dtype = torch.float64, **overrides) -> Any:
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "init_lora_weights": False}
    options["target_modules"] = ["q_proj", "lm_head"]
    torch.manual_seed(0)
    model: Any = get_peft_model(
        tiny_llama(dtype=dtype, vocab_size=V), LoraConfig(**{**options, **overrides})
    )
    return model.to(dtype)


def packed(model: Any) -> torch.Tensor:
    pack = build_pack(tiny_pairs(3, vocab_size=V), range(3), mode="shared")
    return model(pack=pack).token_logps


def padded(model: Any) -> torch.Tensor:
    """The same tokens in the order of the pack: each pair's chosen response, then the rejected."""
    plain = padded_unshared(model, tiny_pairs(3, vocab_size=V))
    return torch.cat([plain[i, side] for i in range(3) for side in (0, 1)])


@pytest.mark.parametrize("names", [["default"], ["default", "more"]], ids=["one", "two adapters"])
def test_equals_peft(names) -> None:
    model = adapted()
    if "more" in names:
        more = LoraConfig(r=2, lora_alpha=1, target_modules=["lm_head"], init_lora_weights=False)
        model.add_adapter("more", more)
        model.base_model.set_adapter(names)
        model.to(torch.float64)
    expected = padded(model)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1)).double()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum("lm_head" in name for name in trained) == 2 * len(names)
    want = torch.autograd.grad((expected * weights).sum(), list(trained.values()))
    prepare_packed_forward(model.get_base_model())
    got = packed(model)
    # fp64 with fp32 norms on the way, as in test_keystone
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    grads = torch.autograd.grad((got * weights).sum(), list(trained.values()))
    for name, one, other in zip(trained, grads, want, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm(), name
    with model.disable_adapter():
        base = packed(model)
        torch.testing.assert_close(base, padded(model), rtol=0, atol=1e-10)
    assert (base - got).abs().max() > 1e-2
    model.merge_adapter()
    assert head_lora(model.get_base_model().lm_head) is None
    torch.testing.assert_close(packed(model), got, rtol=0, atol=1e-10)


def test_adapters_in_fp32_on_a_model_in_bf16() -> None:
    """PEFT's usual way; ours rounds as an operand what PEFT rounds as a result."""
    model = adapted(torch.float32)
    exact = padded(model)
    model.get_base_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    prepare_packed_forward(model.get_base_model())
    # bf16 (eps 8e-3) over two layers on logits of some 10 nat
    assert 1e-5 < (packed(model) - exact).abs().max() < 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"use_dora": True}, r"an adapter \(Dora.*\) on the output head .*modules_to_save"),
        ({"lora_bias": True}, "an adapter with a bias of its own on the output head"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1 in the adapter 'default' on the output head"),
    ],
    ids=["dora", "bias", "dropout"],
)
def test_what_is_more_than_plain_lora_is_refused(overrides, message) -> None:
    with pytest.raises(ModelError, match=message):
        prepare_packed_forward(adapted(torch.float32, **overrides).get_base_model())


def test_other_adapters_are_refused() -> None:
    model: Any = tiny_llama(vocab_size=V)
    get_peft_model(model, IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ModelError, match="an adapter of type Linear on the output head"):
        prepare_packed_forward(model)


def test_a_quantized_head_is_refused() -> None:
    """bitsandbytes keeps 4 bits in uint8 [V * D / 2, 1] and 8 bits in int8 [V, D]."""
    for weight in (torch.zeros(V * 16, 1, dtype=torch.uint8), torch.zeros(V, 32, dtype=torch.int8)):
        model: Any = tiny_llama(vocab_size=V)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ModelError, match=r"Linear has no plain \[V, D\] weight; leave lm_head"):
            prepare_packed_forward(model)
