"""What the flash backends are given, what they refuse, and which backend is chosen."""

import inspect
import sys
import types

import pytest
import torch
import torch.nn.attention.varlen
from transformers import Gemma2Config, LlamaConfig

import fastdpo.attention as attention
import fastdpo.attention_backends as backends
from fastdpo.attention import usable_backends
from fastdpo.attention_backends import missing_for
from fastdpo.errors import ModelError
from tests.attention_cases import CPU, H_KV, H, by_formula, call, some_layout, some_qkv
from tests.attention_stubs import STUBS, varlen_2_10, varlen_2_11


@pytest.fixture
def stub(request, monkeypatch):
    backend, function = STUBS[request.param]
    if backend == "varlen_attn":
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
        backends._varlen_parameters.cache_clear()
    else:
        name = backends.FLASH[backend].module
        package = types.ModuleType(name)
        package.flash_attn_varlen_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, name, package)
    backends._flash_function.cache_clear()
    yield backend
    backends._varlen_parameters.cache_clear()
    backends._flash_function.cache_clear()


@pytest.mark.parametrize("stub", STUBS, indirect=True)
@pytest.mark.parametrize("heads", [H, H_KV])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_backends_get_the_right_arguments(
    stub: str, request, window: int | None, heads: int
) -> None:
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens, torch.float16, heads=heads)
    kwargs = {"scaling": 0.3, "sliding_window": window}
    if "2.10" in request.node.callspec.id and window is not None:
        with pytest.raises(ModelError, match="has no sliding window"):
            call(stub, q, k, v, layout, **kwargs)
        return
    expected = by_formula(q.double(), k.double(), v.double(), layout, 0.3, window)
    out = call(stub, q, k, v, layout, **kwargs)
    assert out.dtype == torch.float16
    # fp16 (eps 1e-3): the scaled query of 2.10 and the result are rounded to it; values around 1.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)


def test_the_varlen_signature_is_one_of_those_tested() -> None:
    options = {"is_causal", "scale", "window_size", "enable_gqa"}
    ours = set(inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters) & options
    tested = [set(inspect.signature(f).parameters) & options for f in (varlen_2_10, varlen_2_11)]
    assert ours in [*tested, {"scale", "window_size", "enable_gqa"}]


@pytest.mark.parametrize("stub", ["flash-attn", "flash-attn 3"], indirect=True)
def test_flash_attention_caps_logits(stub: str) -> None:
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens, torch.float16)
    expected = by_formula(q.double(), k.double(), v.double(), layout, 0.3, None, 0.5)
    out = call(stub, q, k, v, layout, scaling=0.3, softcap=0.5)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("stub", ["varlen 2.13", "flash-attn"], indirect=True)
def test_under_autocast_operands_are_cast_together(stub: str) -> None:
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(stub, q, k, v.bfloat16(), layout)  # rotary embeddings leave q and k in fp32
        assert out.dtype == torch.bfloat16
        assert call(stub, q, k, v, layout).dtype == torch.bfloat16
        assert call("sdpa", q, k, v.bfloat16(), layout).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="bfloat16 or float16, got float32"):
        call(stub, q, k, v, layout)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("stub", ["flash-attn 4"], indirect=True)
def test_what_a_release_lacks_is_refused(stub: str) -> None:
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens, torch.float16)
    with pytest.raises(ModelError, match="flash_attention_4 has no softcapping.*try 'sdpa'"):
        call(stub, q, k, v, layout, softcap=1.0)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ModelError, match="flash_attention_4 as installed has no determinism"):
            call(stub, q, k, v, layout)
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("stub", ["varlen 2.13", "flash-attn", "flash-attn 3"], indirect=True)
def test_sinks_are_refused_where_the_kernel_has_none(stub: str) -> None:
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens, torch.float16)
    with pytest.raises(ModelError, match="no attention sinks.*try 'sdpa'"):
        call(stub, q, k, v, layout, s_aux=torch.zeros(H))


# ---- which backend ---------------------------------------------------------------------------


def test_sdpa_serves_everything_on_a_cpu() -> None:
    config = LlamaConfig()
    kwargs = {"device": CPU, "dtype": torch.float64, "config": config}
    assert usable_backends(None, **kwargs) == ["sdpa"]
    assert usable_backends("sdpa", **kwargs) == ["sdpa"]


def test_a_backend_that_cannot_run_says_why() -> None:
    kwargs = {"device": CPU, "dtype": torch.bfloat16, "config": LlamaConfig()}
    for name in ("varlen_attn", "flash_attention_2", "flash_attention_4", "flex_attention"):
        with pytest.raises(ModelError, match=f"'{name}' can't run here.*CUDA device, this is cpu"):
            usable_backends(name, **kwargs)
    with pytest.raises(ModelError, match="did you mean 'flash_attention_"):
        usable_backends("flash_attention", **kwargs)
    with pytest.raises(ModelError, match="'eager' can't take packs.*packing_mode: padded"):
        usable_backends("eager", **kwargs)


def test_what_is_missing_on_a_gpu_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda, half = torch.device("cuda"), torch.bfloat16
    llama = LlamaConfig()  # heads of 128
    assert missing_for("varlen_attn", device=cuda, dtype=half, config=llama) is None
    fp32 = missing_for("varlen_attn", device=cuda, dtype=torch.float32, config=llama)
    assert fp32 is not None and "this is float32" in fp32
    gemma = missing_for("varlen_attn", device=cuda, dtype=half, config=Gemma2Config())
    assert gemma is not None and "caps attention logits at 50.0" in gemma
    odd = LlamaConfig(hidden_size=60, num_attention_heads=5)
    head = missing_for("varlen_attn", device=cuda, dtype=half, config=odd)
    assert head is not None and "this is 12" in head
    assert missing_for("flex_attention", device=cuda, dtype=half, config=Gemma2Config()) is None
    fa4 = missing_for("flash_attention_4", device=cuda, dtype=half, config=llama)
    assert fa4 is not None and "flash_attn.cute isn't installed; install flash-attn-4" in fa4
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    fa3 = missing_for("flash_attention_3", device=cuda, dtype=half, config=llama)
    assert fa3 is not None and "needs compute capability 9.x, this is 8.0" in fa3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = missing_for("flash_attention_2", device=cuda, dtype=half, config=llama)
    assert package is not None and "install fastdpo[flash]" in package
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = missing_for("varlen_attn", device=cuda, dtype=half, config=llama)
    assert old is not None and "capability 8.0" in old


def test_kernels_are_tried_in_the_order_of_their_speed(monkeypatch, caplog) -> None:
    """With two kernels that can run, the measured one comes first; one that fails, not at all."""
    milliseconds = {"varlen_attn": 2.0, "flash_attention_2": 3.0, "flash_attention_3": 1.0}

    def run(backend, layout, device, dtype, shape):
        assert shape == (32, 32, 128) and layout.segments
        if backend == "flash_attention_4":
            raise RuntimeError("no kernel image is available\nfor this device")
        return milliseconds[backend]

    able = {*milliseconds, "flash_attention_4", "sdpa", "flex_attention"}
    monkeypatch.setattr(attention, "_milliseconds", run)
    monkeypatch.setattr(attention, "missing_for", lambda b, **_: None if b in able else "no")
    attention._by_speed.cache_clear()
    kwargs = {"device": CPU, "dtype": torch.bfloat16, "config": LlamaConfig()}
    with caplog.at_level("INFO", "fastdpo.attention"):
        found = usable_backends(None, **kwargs)
    assert found == [
        *("flash_attention_3", "varlen_attn", "flash_attention_2"),
        *("flex_attention", "sdpa"),
    ]
    attention._by_speed.cache_clear()
    milliseconds["flash_attention_3"] = 1.8  # no more than noise
    assert usable_backends(None, **kwargs)[:2] == ["varlen_attn", "flash_attention_2"]
    assert "flash_attention_4 failed when tried: no kernel image is available" in caplog.text
    assert "varlen_attn 2.00 ms" in caplog.text
    attention._by_speed.cache_clear()


def test_what_is_timed_is_a_layers_attention_both_ways(monkeypatch) -> None:
    """`_milliseconds` itself, on a CPU with a clock in the place of CUDA's events."""
    moments = iter([0.0, 9.0, 0.0, 8.0, 0.0, 3.0, 0.0, 1.0, 0.0, 2.0, 0.0, 5.0, 0.0, 4.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(moments)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    seen = []

    def run(q, k, v, layout, **options):
        seen.append((q.shape, k.shape, v.shape, q.requires_grad and k.requires_grad))
        return backends._sdpa(q, k, v, layout, **options)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setitem(backends.RUN, "varlen_attn", run)
    layout = attention._layout_to_time()
    found = attention._milliseconds("varlen_attn", layout, CPU, torch.float32, (4, 2, 8))
    assert found == 3.0  # the median of the five after two to warm up: 3, 1, 2, 5, 4
    n_q, n_k = layout.segments[-1][1], layout.segments[-1][3]
    assert n_q == 16 * (256 + 2 * 128) and n_k == 16 * 2 * (256 + 128)
    assert seen == [((n_q, 4, 8), (n_k, 2, 8), (n_k, 2, 8), True)] * 7
    with pytest.raises(StopIteration):  # every turn was taken
        next(moments)
