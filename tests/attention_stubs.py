"""What varlen_attn and flash-attn's releases document, on a CPU: signatures, and what they compute.

A stub asserts what its kernel would need of dtypes, shapes and lengths.
"""

import torch


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
