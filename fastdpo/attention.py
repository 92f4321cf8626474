"""Attention over packs, registered with transformers, so that decoders run unpatched.

A packed forward hands its `PackLayout` to the decoder as the keyword `pack_layout`; transformers
passes it on to the attention function, also when gradient checkpointing recomputes a layer. Without
the keyword the functions are transformers' own, so generating and plain forwards work as ever.
No backend here builds a mask over a whole pack, and none applies attention dropout.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from .batch import PackLayout
from .errors import ModelError, did_you_mean
from .rows import gather_rows

BACKENDS = ("varlen_attn", "flash_attention_2", "sdpa")
"""In the order of preference. Names are transformers', and PyTorch's for its own."""

# transformers takes any name with "flash" or "sdpa" in it for its own, with its own conditions.
_REGISTERED = {
    "varlen_attn": "fastdpo_varlen",
    "flash_attention_2": "fastdpo_fa2",
    "sdpa": "fastdpo_segments",
}
_FLASH_MAX_HEAD_DIM = 256
_HALF_DTYPES = (torch.float16, torch.bfloat16)


# ---- which backend ---------------------------------------------------------------------------


def missing_for(
    backend: str, *, device: torch.device, dtype: torch.dtype, config: PretrainedConfig
) -> str | None:
    """What keeps `backend` from running packs of this model here; None where nothing does.

    `dtype` is what attention computes in: the autocast dtype where autocast is on.
    """
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if dtype not in _HALF_DTYPES:
        return f"it computes in bfloat16 or float16, this is {_dtype_name(dtype)}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer"
    head_dim = _head_dim(config)
    if head_dim is not None and (head_dim > _FLASH_MAX_HEAD_DIM or head_dim % 8):
        return f"it takes head sizes up to {_FLASH_MAX_HEAD_DIM} in steps of 8, this is {head_dim}"
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if backend == "varlen_attn":
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return f"PyTorch has it since 2.10, this is {torch.__version__}"
        if softcap is not None:
            return f"it has no softcapping, and this model caps attention logits at {softcap}"
    elif importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn isn't installed; install fastdpo[flash]"
    return None


def usable_backends(
    name: str | None, *, device: torch.device, dtype: torch.dtype, config: PretrainedConfig
) -> list[str]:
    """The backends to try, best first; only `name` if it is given.

    Raises `ModelError` for a name that is no backend, or one that can't run here, with the reason.
    """
    if name is None:
        return [
            backend
            for backend in BACKENDS
            if missing_for(backend, device=device, dtype=dtype, config=config) is None
        ]
    if name not in BACKENDS:
        raise ModelError(
            f"attn_implementation {name!r} can't take packs; choose one of {', '.join(BACKENDS)}"
            f"{did_you_mean(name, BACKENDS)}, leave it out, or set packing_mode: padded"
        )
    missing = missing_for(name, device=device, dtype=dtype, config=config)
    if missing is not None:
        raise ModelError(f"attn_implementation {name!r} can't run here: {missing}; try 'sdpa'")
    return [name]


def resolve_backend(
    name: str | None, *, device: torch.device, dtype: torch.dtype, config: PretrainedConfig
) -> str:
    """`name` if it can run here, or the best that can; errors as in `usable_backends`."""
    return usable_backends(name, device=device, dtype=dtype, config=config)[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _head_dim(config: PretrainedConfig) -> int | None:
    text = config.get_text_config()
    if getattr(text, "head_dim", None):
        return int(text.head_dim)
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


# ---- the backends: q [T, H, D], k and v [T_k, H_kv, D] -> [T, H, D] ----------------------------


def _split(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """[T, H, D] -> S of [1, H, length, D]. A split's backward is one concatenation."""
    return x.transpose(0, 1).unsqueeze(0).split(list(lengths), dim=2)


def _segment_masks(
    layout: PackLayout, window: int | None, device: torch.device
) -> list[Tensor | None]:
    """For each segment the [q, k] bool mask, or None where plain causality or no mask serves."""
    if window is not None and window >= layout.max_seqlen_k:
        window = None
    masks = layout.masks.get(window)
    if masks is None:
        masks = [
            _segment_mask(q_end - q_start, k_end - k_start, window, device)
            for q_start, q_end, k_start, k_end in layout.segments
        ]
        layout.masks[window] = masks
    return masks


def _segment_mask(q: int, k: int, window: int | None, device: torch.device) -> Tensor | None:
    if (window is None or k <= window) and q in (1, k):
        return None
    place = torch.arange(k, device=device)
    back = place[k - q :, None] - place  # how far behind the query a key lies; bottom-right
    mask = back >= 0
    return mask if window is None else mask & (back < window)  # a window counts the token itself


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One `scaled_dot_product_attention` a segment; any device and dtype."""
    q_lengths = [q_end - q_start for q_start, q_end, _, _ in layout.segments]
    k_lengths = [k_end - k_start for _, _, k_start, k_end in layout.segments]
    explicit = softcap is not None or sinks is not None
    grouped = q.shape[1] != k.shape[1]
    if grouped and (explicit or q.is_cuda):  # on CUDA a mask and grouped heads meet no fast kernel
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    parts = []
    for q_part, k_part, v_part, mask in zip(
        _split(q, q_lengths),
        _split(k, k_lengths),
        _split(v, k_lengths),
        _segment_masks(layout, window, q.device),
        strict=True,
    ):
        if explicit:
            part = _explicit_attention(q_part, k_part, v_part, mask, scale, softcap, sinks)
        else:
            causal = mask is None and q_part.shape[2] > 1
            part = F.scaled_dot_product_attention(
                q_part,
                k_part,
                v_part,
                attn_mask=mask,
                is_causal=causal,
                scale=scale,
                enable_gqa=grouped,
            )
        parts.append(part)
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what SDPA lacks: capped logits (Gemma 2), a sink per head (GPT-OSS)."""
    scores = (q @ k.mT * scale).to(torch.promote_types(q.dtype, torch.float32))  # [1, H, q, k]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """PyTorch's variable-length flash attention; its signature differs between 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(
        "varlen_attn", {"softcapping": softcap is not None, "attention sinks": sinks is not None}
    )
    parameters = _varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" in parameters:
        options["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    else:  # 2.10
        _refuse(
            f"varlen_attn of PyTorch {torch.__version__}", {"sliding window": window is not None}
        )
        options["is_causal"] = True
    if "scale" in parameters:
        options["scale"] = scale
    else:  # 2.10 always divides by sqrt(D)
        q = q * (scale * q.shape[-1] ** 0.5)
    if "enable_gqa" in parameters:  # before that, fewer key heads need no leave
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    q, k, v = _as_half(q, k, v)
    out = varlen_attn(
        q,
        k,
        v,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        **options,
    )
    assert isinstance(out, Tensor)
    return out


def _flash_attention_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The package flash-attn, version 2.1 or newer (bottom-right causal)."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    _refuse("flash_attention_2", {"attention sinks": sinks is not None})
    q, k, v = _as_half(q, k, v)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=layout.cu_seqlens_q,
        cu_seqlens_k=layout.cu_seqlens_k,
        max_seqlen_q=layout.max_seqlen_q,
        max_seqlen_k=layout.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


_RUN = {"varlen_attn": _varlen_attn, "flash_attention_2": _flash_attention_2, "sdpa": _sdpa}


def _refuse(backend: str, asked: dict[str, bool]) -> None:
    for what, is_asked in asked.items():
        if is_asked:
            raise ModelError(f"{backend} has no {what}, which this model needs; try 'sdpa'")


def _common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One dtype for all: under autocast rotary embeddings give fp32 q and k beside a 16-bit v."""
    device_type = tensors[0].device.type
    if len({t.dtype for t in tensors}) == 1:
        return tensors
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = tensors[-1].dtype  # the values': what the output projection expects
    return tuple(t.to(dtype) for t in tensors)


def _as_half(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What the flash kernels take; under autocast fp32 operands are cast as a matmul's would be."""
    device_type = tensors[0].device.type
    dtype = tensors[0].dtype
    if dtype not in _HALF_DTYPES and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = tuple(t.to(dtype) for t in tensors)
    if dtype not in _HALF_DTYPES:
        raise ModelError(
            f"flash attention computes in bfloat16 or float16, got {_dtype_name(dtype)}; set bf16 "
            "or dtype, or attn_implementation: sdpa"
        )
    return tensors


# ---- what transformers calls -----------------------------------------------------------------


def _packed_attention(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackLayout,
    *,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
) -> Tensor:
    """query [1, H, T, D], key, value [1, H_kv, T, D] -> [1, T, H, D], as transformers has them."""
    if layout.trace is not None:
        layout.trace.append((getattr(module, "layer_idx", None), sliding_window))
    if dropout:
        raise ModelError(f"attention_dropout is {dropout}; packs have none: set it to 0")
    _refuse(
        "attention over packs",
        {"position bias": position_bias is not None, "bidirectional layers": is_causal is False},
    )
    query, key, value = _common_dtype(query, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    out = _RUN[backend](
        q,
        gather_rows(k, layout.kv),
        gather_rows(v, layout.kv),
        layout,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0)


def _attention_function(backend: str, plain: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        pack_layout: PackLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if pack_layout is None:
            function = sdpa_attention_forward if plain == "sdpa" else _eager_of(module)
            qkv = (query, key, value)
            return function(
                module, *qkv, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        out = _packed_attention(
            backend,
            module,
            query,
            key,
            value,
            pack_layout,
            scaling=scaling,
            dropout=dropout,
            sliding_window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            s_aux=kwargs.get("s_aux"),
            is_causal=kwargs.get("is_causal"),
            position_bias=kwargs.get("position_bias"),
        )
        return out, None

    return forward


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention in the model's own file: for models that SDPA can't serve."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(f"{type(module).__module__} has no eager attention to run without a pack")
    return function


def registered_name(backend: str, *, plain: str) -> str:
    """The name under which transformers knows `backend`; calls without a pack use `plain`,
    "sdpa" or "eager"."""
    return _REGISTERED[backend] + ("" if plain == "sdpa" else "_eager")


for _backend in BACKENDS:
    for _plain, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        _name = registered_name(_backend, plain=_plain)
        AttentionInterface.register(_name, _attention_function(_backend, _plain))
        AttentionMaskInterface.register(_name, _mask)
