"""Which models get packs, which fall back and why, and what binding the forward leaves alone."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

import fastdpo.attention as attention
import fastdpo.attention_backends as attention_backends
from fastdpo.batch import PackLayout
from fastdpo.errors import ConfigError, ModelError
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack
from fastdpo.probe import _relative_error
from fastdpo.rows import RowGather

from . import families
from .tiny import tiny_llama, tiny_mistral, tiny_pairs

V = families.V


def token_logps(model: Any, mode: str) -> torch.Tensor:
    pairs = tiny_pairs(4, vocab_size=V, pairs_per_prompt=2)
    with torch.no_grad():
        return model(pack=build_pack(pairs, range(4), mode=mode)).token_logps


def test_a_forced_mode_is_that_or_an_error() -> None:
    stable = families.by_name("StableLM")
    model, reason = stable.build(), stable.why
    for mode in ("shared", "unshared"):
        with pytest.raises(ModelError, match=f"StableLm.*{mode} with sdpa: {reason}.*auto"):
            prepare_packed_forward(model, mode=mode)
    assert prepare_packed_forward(model, mode="padded").reason is None
    with pytest.raises(ConfigError, match="did you mean 'padded'"):
        prepare_packed_forward(model, mode="paded")


def leaking(q, k, v, layout: PackLayout, **kwargs):
    """Attention as a model without varlen support would have it: over the whole row."""
    n = q.shape[0]
    # k and v come gathered by the true layout; the first occurrences are the rows as laid out.
    k, v = k[layout.kv.first], v[layout.kv.first]
    whole = PackLayout(
        RowGather.plan(torch.arange(n).numpy(), n), layout.cu_seqlens_q, layout.cu_seqlens_k,
        ((0, n, 0, n),), ((0, 0),), n, n,
    )  # fmt: skip
    return attention_backends._sdpa(q, k, v, whole, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_that_leaks_is_caught(dtype: torch.dtype, monkeypatch) -> None:
    model: Any = tiny_llama(dtype=dtype)
    assert prepare_packed_forward(model).mode == "shared"
    monkeypatch.setitem(attention.RUN, "sdpa", leaking)
    info = prepare_packed_forward(model)
    assert info.mode == "padded" and info.reason is not None
    assert "hidden states differ from separate forwards" in info.reason


def test_a_window_that_does_not_arrive_is_caught() -> None:
    model: Any = tiny_mistral(sliding_window=7)
    assert prepare_packed_forward(model).mode == "shared"
    for layer in model.model.layers:  # the window stays in the config; the calls lose it
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config.sliding_window = None
    info = prepare_packed_forward(model)
    assert info.mode == "padded" and info.reason is not None and "hidden states" in info.reason


def test_a_window_too_wide_to_try_is_compared_with_the_config() -> None:
    config = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
    model = families.by_name("Qwen2, Qwen2.5").build(**config)
    assert prepare_packed_forward(model).mode == "shared"
    model.model.layers[1].self_attn.sliding_window = None
    info = prepare_packed_forward(model)
    assert info.reason is not None
    assert "layer 1 is of type sliding_attention but got window None" in info.reason


def test_logits_that_the_config_does_not_name_are_caught() -> None:
    model: Any = tiny_llama()
    plain = model.forward

    def doubled(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(ModelError, match="something to its logits that its config doesn't name"):
        prepare_packed_forward(model)


def test_the_probe_leaves_no_trace() -> None:
    model: Any = tiny_llama().train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    prepare_packed_forward(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert "attn_implementation" not in model.config.to_dict()


# ---- what is refused by name --------------------------------------------------------------------


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ModelError, match="attention_dropout is 0.1 in model.layers.0.self_attn"):
        prepare_packed_forward(tiny_llama(attention_dropout=0.1))
    info = prepare_packed_forward(tiny_llama(attention_dropout=0.1), mode="padded")
    assert info.mode == "padded"  # the model's own attention applies it


def test_a_model_without_a_head_is_refused() -> None:
    headless: Any = tiny_llama().model
    with pytest.raises(ModelError, match="LlamaModel has no language-model head"):
        prepare_packed_forward(headless)


# ---- the bound forward --------------------------------------------------------------------------


def test_plain_calls_are_the_models_own() -> None:
    model: Any = tiny_llama().eval()
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    prepare_packed_forward(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


def test_models_without_sdpa_generate_as_before() -> None:
    model = families.by_name("GPT-OSS").build()
    ids = torch.arange(1, 13).reshape(1, 12)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert prepare_packed_forward(model).mode == "shared"
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


def test_a_pack_is_all_the_input_there_is() -> None:
    model: Any = tiny_llama()
    prepare_packed_forward(model)
    pack = build_pack(tiny_pairs(1), [0], mode="shared")
    with pytest.raises(TypeError, match="a pack holds all inputs; got .'input_ids'."):
        model(input_ids=pack.input_ids[None], pack=pack)
    with pytest.raises(ModelError, match="a padded batch for a model prepared for mode 'shared'"):
        model(pack=build_pack(tiny_pairs(1), [0], mode="padded"))


def test_a_copy_computes_with_its_own_weights() -> None:
    model: Any = tiny_llama()
    prepare_packed_forward(model)
    twin = copy.deepcopy(model)
    before = token_logps(twin, "shared")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(token_logps(twin, "shared"), before)
    assert not torch.equal(token_logps(model, "shared"), before)
    ids = torch.arange(4)[None]
    assert twin(input_ids=ids).logits.abs().max() > 0


def test_peft_adapters_apply_and_switch_off() -> None:
    model: Any = tiny_llama(vocab_size=V)
    expected = copy.deepcopy(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model: Any = get_peft_model(model, config)
    prepare_packed_forward(peft_model.get_base_model())
    prepare_packed_forward(expected)
    base = token_logps(expected, "shared")
    assert (token_logps(peft_model, "shared") - base).abs().max() > 1e-3
    with peft_model.disable_adapter():
        assert torch.equal(token_logps(peft_model, "shared"), base)


def test_a_head_trained_whole_follows_the_adapter() -> None:
    model: Any = tiny_llama(vocab_size=V)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft_model: Any = get_peft_model(model, config)
    prepare_packed_forward(peft_model.get_base_model())
    pack = build_pack(tiny_pairs(2, vocab_size=V), range(2), mode="shared")
    peft_model(pack=pack).token_logps.sum().backward()
    head = peft_model.get_base_model().lm_head
    trained = head.modules_to_save["default"].weight
    assert trained.grad.abs().max() > 0 and head.original_module.weight.grad is None
    before = token_logps(model, "shared")
    with torch.no_grad():
        trained.mul_(0.5)
    assert (token_logps(model, "shared") - before).abs().max() > 1e-3
    with peft_model.disable_adapter():
        assert torch.equal(token_logps(model, "shared"), before)


def test_accelerate_wraps_and_unwraps_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    model: Any = tiny_llama(vocab_size=V)
    prepare_packed_forward(model)
    exact = token_logps(model, "shared")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare(model)
        rounded = token_logps(prepared, "shared")
        assert rounded.dtype == torch.float32
        difference = (rounded - exact).abs().max()
        # bf16 (eps 8e-3) over 2 layers on logits of some 10 nat: seen, but no more than rounding.
        assert 1e-5 < difference < 0.5
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_ddp_calls_it_and_averages_gradients(tmp_path) -> None:
    model: Any = tiny_llama(vocab_size=V)
    prepare_packed_forward(model)
    pack = build_pack(tiny_pairs(2, vocab_size=V), range(2), mode="shared")
    model(pack=pack).token_logps.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        ddp(pack=pack).token_logps.sum().backward()
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_autocast_gives_what_plain_autocast_gives() -> None:
    model: Any = tiny_llama(vocab_size=V)
    with torch.autocast("cpu", torch.bfloat16):
        prepare_packed_forward(model)
    exact = token_logps(model, "shared")
    pack = build_pack(tiny_pairs(4, vocab_size=V, pairs_per_prompt=2), range(4), mode="shared")
    with torch.autocast("cpu", torch.bfloat16):
        found = model(pack=pack).token_logps
    found.sum().backward()  # weights cast while the probe ran must not have lost their graph
    assert found.dtype == torch.float32
    assert 1e-5 < (found - exact).abs().max() < 0.5  # as above
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_rows_of_zeros_are_compared_too() -> None:
    """A padding token's row may be zero in both; where it is in one alone, that is a failure."""
    rows = torch.randn(4, 8)
    rows[1] = 0
    assert _relative_error(rows, rows) == 0
    found = rows.clone()
    found[1, 0] = 1e-3
    assert _relative_error(found, rows) > 1
