"""Attention over packs: SDPA against the formula, GPUs against SDPA; without a pack, plain SDPA."""

import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastdpo.attention as attention
from fastdpo.attention_backends import missing_for
from fastdpo.errors import ModelError
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack
from tests.attention_cases import H_KV, H, by_formula, call, some_layout, some_qkv
from tests.tiny import tiny_llama, tiny_pairs

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
