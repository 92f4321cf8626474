"""A pack's layout, random operands, the formula of attention over them, and a call of a backend."""

import types

import torch
from transformers import AttentionInterface

from fastdpo.attention import registered_name
from fastdpo.batch import PackLayout
from fastdpo.packing import build_pack
from tests.tiny import tiny_pairs

H, H_KV, D = 4, 2, 8
CPU = torch.device("cpu")


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
