"""Attention over packs: every backend against the formula, and transformers' own without a pack."""

import inspect
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, Gemma2Config, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastdpo.attention as attention
import fastdpo.attention_backends as backends
import fastdpo.attention_flex as flex
from fastdpo.attention import registered_name, resolve_backend, usable_backends
from fastdpo.attention_backends import missing_for
from fastdpo.batch import PackLayout
from fastdpo.errors import ModelError
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack

from .tiny import tiny_llama, tiny_pairs

H, H_KV, D = 4, 2, 8
CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def some_layout(mode: str = "shared", n: int = 5) -> tuple[PackLayout, int]:
    pairs = tiny_pairs(n, pairs_per_prompt=2)
    pack = build_pack(pairs, range(n), mode=mode)
    assert pack.layout is not None
    return pack.layout, pack.n_tokens


def some_qkv(
    n_tokens: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    heads: int = H_KV,
    dim: int = D,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, H, n_tokens, dim), (1, heads, n_tokens, dim), (1, heads, n_tokens, dim)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    q, k, v = (t.to(device, dtype).requires_grad_() for t in tensors)
    return q, k, v


def by_formula(q, k, v, layout: PackLayout, scale, window=None, softcap=None, sinks=None):
    """Row by row, head by head: softmax over the keys that the layout names. [1, T, H, D]."""
    keys = layout.kv_index.tolist()
    rows = []
    for q_start, q_end, k_start, k_end in layout.segments:
        for row in range(q_start, q_end):
            end = k_end - (q_end - 1 - row)
            start = k_start if window is None else max(k_start, end - window)
            seen = keys[start:end]
            heads = []
            for h in range(H):
                kv = h // (H // k.shape[1])
                scores = (k[0, kv, seen] @ q[0, h, row]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1]])
                heads.append(scores.softmax(0)[: len(seen)] @ v[0, kv, seen])
            rows.append(torch.stack(heads))
    return torch.stack(rows).unsqueeze(0)


def call(backend: str, q, k, v, layout: PackLayout | None, mask=None, **kwargs):
    function = AttentionInterface()[registered_name(backend, plain="sdpa")]
    module = types.SimpleNamespace(num_key_value_groups=H // H_KV, is_causal=True, layer_idx=0)
    out, weights = function(module, q, k, v, mask, pack_layout=layout, **kwargs)
    assert weights is None
    return out


# ---- SDPA over segments ----------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("mode", ["shared", "unshared"])
def test_sdpa_segments_are_the_formula(mode: str, extra: str, window: int | None) -> None:
    layout, n_tokens = some_layout(mode)
    q, k, v = some_qkv(n_tokens)
    softcap = 1.5 if extra == "softcap" else None
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if extra == "sinks" else None
    inputs = [q, k, v] + ([] if sinks is None else [sinks])
    expected = by_formula(q, k, v, layout, 0.3, window, softcap, sinks)
    out = call(
        "sdpa", q, k, v, layout, scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sinks
    )
    weights = torch.randn(out.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    # fp64: a few hundred roundings of 2.2e-16 on values around 1.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


# ---- FlexAttention ---------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_flex_attention_is_the_formula(extra, window, monkeypatch) -> None:
    """Uncompiled, on CPU, where PyTorch refuses gradients before it computes them well."""
    import torch.nn.attention.flex_attention as theirs

    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens)
    softcap = 1.5 if extra == "softcap" else None
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if extra == "sinks" else None
    inputs = [q, k, v] + ([] if sinks is None else [sinks])
    expected = by_formula(q, k, v, layout, 0.3, window, softcap, sinks)
    kwargs = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    out = call("flex_attention", q, k, v, layout, scaling=0.3, **kwargs)
    weights = torch.randn(out.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    # fp64, as above; its log-sum-exp is fp32, which sinks read (eps 1.2e-7).
    atol = 1e-12 if sinks is None else 1e-6
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("window", [None, 1, 6, 11])
@pytest.mark.parametrize("mode", ["shared", "unshared"])
def test_flex_attentions_blocks_hold_what_is_seen(mode, window, monkeypatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", 4)  # T is some 60 here, 128 a block there
    layout, n_tokens = some_layout(mode)
    n_blocks = -(-n_tokens // 4)
    seen = torch.zeros(4 * n_blocks, 4 * n_blocks, dtype=torch.bool)
    keys = layout.kv_index.tolist()
    for q_start, q_end, k_start, k_end in layout.segments:
        for row in range(q_start, q_end):
            end = k_end - (q_end - 1 - row)
            seen[row, keys[k_start if window is None else max(k_start, end - window) : end]] = True
    row, column = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None]
    mask = flex._block_mask(layout, window, CPU)
    by_rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), row, column)
    assert torch.equal(by_rule, seen[:n_tokens, :n_tokens])
    blocks = seen.view(n_blocks, 4, n_blocks, 4)
    some, every = blocks.any(3).any(1), blocks.all(3).all(1)
    n_masked, masked, n_whole, whole = flex._block_lists(layout, window)
    tables = []
    for counts, indices in ((n_masked, masked), (n_whole, whole)):
        table = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
        for block, n in enumerate(counts[0, 0]):
            table[block, indices[0, 0, block, :n].tolist()] = True
        tables.append(table)
    assert torch.equal(tables[0] ^ tables[1], some)  # each block once
    assert not (tables[1] & ~every).any()
    assert tables[1].any() or window is not None


def test_packs_share_flex_attentions_graphs(monkeypatch) -> None:
    """Two windows and growing packs: one graph a window for the first, one for all other lengths.

    A mask is a new closure for every pack; it must not compile anew for that.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend="eager")
    monkeypatch.setattr(flex, "_function", lambda is_cuda: compiled)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for n in (6, 7, 8, 9):
        pairs = tiny_pairs(n, seed=n, prompt_lengths=(40, 90), response_lengths=(20, 60))
        pack = build_pack(pairs, range(n), mode="shared")
        for window in (None, 30):
            q, k, v = (x.detach() for x in some_qkv(pack.n_tokens, torch.float32, dim=16))
            with torch.no_grad():
                call("flex_attention", q, k, v, pack.layout, sliding_window=window)
    assert graphs["unique_graphs"] - before == 4
    torch._dynamo.reset()


def test_masks_are_made_once_for_all_layers() -> None:
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens)
    call("sdpa", q, k, v, layout)
    first = layout.masks[None]
    call("sdpa", q, k, v, layout, sliding_window=4)
    call("sdpa", q, k, v, layout)
    assert layout.masks[None] is first and set(layout.masks) == {None, 4}


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_mask_of_the_whole_pack_is_built() -> None:
    model = tiny_llama(vocab_size=64)
    prepare_packed_forward(model, mode="shared")
    pairs = tiny_pairs(40, vocab_size=64, prompt_lengths=(10, 10), response_lengths=(10, 10))
    pack = build_pack(pairs, range(40), mode="shared")
    with LargestTensor() as largest:
        model(pack=pack).token_logps.sum().backward()
    # The widest activation is N x V or T x (MLP width, 56); a pack-wide mask would be T x T.
    assert largest.numel <= 64 * max(pack.n_tokens, len(pack.targets)) < pack.n_tokens**2


# ---- without a pack --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_without_a_pack_it_is_transformers_sdpa(backend: str) -> None:
    q, k, v = some_qkv(12, torch.float32)
    module = types.SimpleNamespace(num_key_value_groups=H // H_KV, is_causal=True)
    mask = torch.rand(1, 1, 12, 12) > 0.3
    mask |= torch.eye(12, dtype=torch.bool)
    for m in (None, mask):
        expected, _ = sdpa_attention_forward(module, q, k, v, m, scaling=0.2)  # type: ignore[arg-type]
        assert torch.equal(call(backend, q, k, v, None, mask=m, scaling=0.2), expected)


# ---- the flash backends, against stubs that follow their documentation -------------------------


def window_reference(q, k, v, cu_q, cu_k, scale, left, right, softcap=0.0):
    """flash-attention's documented meaning: with lengths q and k, query i sees keys from
    i + k - q - left to i + k - q + right, inclusive; -1 is no bound. In fp32."""
    parts = []
    for s in range(len(cu_q) - 1):
        qs, ks, vs = (
            x[a[s] : a[s + 1]].float().transpose(0, 1) for x, a in ((q, cu_q), (k, cu_k), (v, cu_k))
        )
        ks, vs = (x.repeat_interleave(qs.shape[0] // x.shape[0], dim=0) for x in (ks, vs))
        n_q, n_k = qs.shape[1], ks.shape[1]
        scores = qs @ ks.mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        offset = torch.arange(n_k) - (torch.arange(n_q)[:, None] + n_k - n_q)
        seen = torch.ones_like(offset, dtype=torch.bool)
        if left >= 0:
            seen &= offset >= -left
        if right >= 0:
            seen &= offset <= right
        parts.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ vs)
    return torch.cat(parts, dim=1).transpose(0, 1).to(q.dtype)


def check_arguments(q, k, v, cu_q, cu_k, max_q, max_k) -> None:
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (q.shape[0], k.shape[0], v.shape[0]) == (cu_q[-1], cu_k[-1], cu_k[-1])
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())


def varlen_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    check_arguments(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)
    right = 0 if is_causal else -1
    return window_reference(q, k, v, cu_seq_q, cu_seq_k, q.shape[-1] ** -0.5, -1, right)


def varlen_2_11(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    check_arguments(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return window_reference(q, k, v, cu_seq_q, cu_seq_k, scale, *window_size)


def varlen_2_13(
    q,
    k,
    v,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    num_splits=None,
):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    sizes = {"scale": scale, "window_size": window_size}
    return varlen_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **sizes)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The signature of flash-attn 2.7 and 2.8."""
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert dropout_p == 0.0 and deterministic == torch.are_deterministic_algorithms_enabled()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size[0], 0 if causal else window_size[1]
    return window_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """The signature of flash-attention 3 (flash_attn_interface)."""
    out = flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
    )
    return out, torch.zeros(())  # as its first releases did


def flash_attn_4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
):
    """The signature of flash-attention 4's first releases (flash_attn.cute)."""
    assert cu_seqlens_q is not None and cu_seqlens_k is not None and learnable_sink is None
    left = -1 if window_size[0] is None else window_size[0]
    right = 0 if causal else -1
    out = window_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, right, softcap)
    return out, None


STUBS = {
    "varlen 2.10": ("varlen_attn", varlen_2_10),
    "varlen 2.11": ("varlen_attn", varlen_2_11),
    "varlen 2.13": ("varlen_attn", varlen_2_13),
    "flash-attn": ("flash_attention_2", flash_attn_varlen_func),
    "flash-attn 3": ("flash_attention_3", flash_attn_3),
    "flash-attn 4": ("flash_attention_4", flash_attn_4),
}


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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dropout": 0.1}, "attention_dropout is 0.1"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"is_causal": False}, "bidirectional"),
    ],
)
def test_what_packs_cannot_do_is_refused(kwargs: dict, message: str) -> None:
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens)
    with pytest.raises(ModelError, match=message):
        call("sdpa", q, k, v, layout, **kwargs)


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
    assert resolve_backend("sdpa", **kwargs) == "sdpa"


def test_a_backend_that_cannot_run_says_why() -> None:
    kwargs = {"device": CPU, "dtype": torch.bfloat16, "config": LlamaConfig()}
    for name in ("varlen_attn", "flash_attention_2", "flash_attention_4", "flex_attention"):
        with pytest.raises(ModelError, match=f"'{name}' can't run here.*CUDA device, this is cpu"):
            resolve_backend(name, **kwargs)
    with pytest.raises(ModelError, match="did you mean 'flash_attention_"):
        resolve_backend("flash_attention", **kwargs)
    with pytest.raises(ModelError, match="'eager' can't take packs.*packing_mode: padded"):
        resolve_backend("eager", **kwargs)


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


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("backend", [b for b in attention.BACKENDS if b != "sdpa"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_backends_equal_sdpa(backend: str, window: int | None, dtype: torch.dtype) -> None:
    config = LlamaConfig(head_dim=64)
    missing = missing_for(backend, device=torch.device("cuda"), dtype=dtype, config=config)
    if missing is not None:
        pytest.skip(missing)
    pairs = tiny_pairs(5, pairs_per_prompt=2, prompt_lengths=(50, 90), response_lengths=(1, 70))
    pack = build_pack(pairs, range(5), mode="shared").to("cuda")
    assert pack.layout is not None
    q, k, v = some_qkv(pack.n_tokens, dtype, "cuda", dim=64)
    out = call(backend, q, k, v, pack.layout, sliding_window=window)
    weights = torch.randn(out.shape, device="cuda", dtype=torch.float64)
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = call("sdpa", exact[0], exact[1], exact[2], pack.layout, sliding_window=window)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), exact)
    # The kernels round probabilities and results to the dtype: a few eps of the largest value.
    eps = torch.finfo(dtype).eps
    pairs_to_compare = [(out, expected), *zip(gradients, expected_gradients, strict=True)]
    for found, reference in pairs_to_compare:
        bound = 4 * eps * float(reference.abs().max())
        torch.testing.assert_close(found.double(), reference, rtol=0, atol=bound)


def test_some_layout_has_what_the_tests_are_about() -> None:
    layout, _ = some_layout()
    lengths = np.array(layout.segments)
    q_lengths, k_lengths = lengths[:, 1] - lengths[:, 0], lengths[:, 3] - lengths[:, 2]
    assert (q_lengths == k_lengths).any() and (q_lengths < k_lengths).any()
    assert k_lengths.max() > 6
