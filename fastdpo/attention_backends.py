"""What can run attention over packs: SDPA over segments, and the variable-length kernels.

Each takes q as laid out [T, H, D] and k, v [T_k, H_kv, D] with prompts repeated, and gives
[T, H, D]; FlexAttention, which needs no repetition, is in attention_flex.py. Which one runs is
attention.py's affair. None builds a mask over a whole pack, and none applies dropout.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from .batch import PackLayout
from .errors import ModelError

HALF_DTYPES = (torch.float16, torch.bfloat16)


class Flash(NamedTuple):
    """A release of flash-attn: where its function is, how to get it, and what it takes."""

    module: str
    install: str
    capabilities: tuple[int, ...]  # major compute capabilities; none: 8 and newer
    max_head_dim: int
    has_softcap: bool


FLASH = {
    "flash_attention_2": Flash("flash_attn", "install fastdpo[flash]", (), 256, True),
    "flash_attention_3": Flash(
        "flash_attn_interface", "build flash-attention's hopper folder", (9,), 256, True
    ),
    "flash_attention_4": Flash("flash_attn.cute", "install flash-attn-4", (9, 10, 11), 128, False),
}


# ---- what can run where ------------------------------------------------------------------------


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
    major, minor = torch.cuda.get_device_capability(device)
    is_nvidia = torch.version.hip is None
    if is_nvidia and major < 8:
        return "it needs compute capability 8.0 (Ampere) or newer"
    dim = head_dim(config)
    if backend == "flex_attention":
        small = dim is not None and dim < 16
        return f"it takes head sizes of 16 and more, this is {dim}" if small else None
    if dtype not in HALF_DTYPES:
        return f"it computes in bfloat16 or float16, this is {dtype_name(dtype)}"
    flash = FLASH.get(backend)
    largest = 256 if flash is None else flash.max_head_dim
    if dim is not None and (dim > largest or dim % 8):
        return f"it takes head sizes up to {largest} in steps of 8, this is {dim}"
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None and (flash is None or not flash.has_softcap):
        return f"it has no softcapping, and this model caps attention logits at {softcap}"
    if flash is None:
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return f"PyTorch has it since 2.10, this is {torch.__version__}"
        return None
    if flash.capabilities and major not in flash.capabilities:
        wanted = " or ".join(f"{of}.x" for of in flash.capabilities)
        return f"it needs compute capability {wanted}, this is {major}.{minor}"
    if not _is_installed(flash.module):
        return f"{flash.module} isn't installed; {flash.install}"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a module inside a package that is missing
        return False


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def head_dim(config: PretrainedConfig) -> int | None:
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

    refuse(
        "varlen_attn", {"softcapping": softcap is not None, "attention sinks": sinks is not None}
    )
    parameters = _varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" in parameters:
        options["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    else:  # 2.10
        refuse(
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


@functools.cache
def _flash_function(module: str) -> tuple[Callable[..., Any], frozenset[str]]:
    function = importlib.import_module(module).flash_attn_varlen_func
    return function, frozenset(inspect.signature(function).parameters)


def _flash_attention(
    backend: str,
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
    """flash-attn 2.1 and newer, 3 or 4 (bottom-right causal): one function, in three signatures."""
    flash = FLASH[backend]
    softcaps = softcap is not None and not flash.has_softcap
    refuse(backend, {"attention sinks": sinks is not None, "softcapping": softcaps})
    function, parameters = _flash_function(flash.module)
    no_bound = None if backend == "flash_attention_4" else -1
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (no_bound, no_bound) if window is None else (window - 1, 0),
    }
    if softcap is not None:
        options["softcap"] = softcap
    if "max_seqlen_q" in parameters:  # the first releases of 4 read it off cu_seqlens
        options |= {"max_seqlen_q": layout.max_seqlen_q, "max_seqlen_k": layout.max_seqlen_k}
    if torch.are_deterministic_algorithms_enabled():
        refuse(f"{backend} as installed", {"determinism": "deterministic" not in parameters})
        options["deterministic"] = True
    q, k, v = _as_half(q, k, v)
    out = function(
        q, k, v, cu_seqlens_q=layout.cu_seqlens_q, cu_seqlens_k=layout.cu_seqlens_k, **options
    )
    return out[0] if isinstance(out, tuple) else out  # with the log-sum-exp, in some releases


RUN: dict[str, Callable[..., Tensor]] = {
    "varlen_attn": _varlen_attn,
    "sdpa": _sdpa,
    **{backend: functools.partial(_flash_attention, backend) for backend in FLASH},
}


def refuse(backend: str, asked: dict[str, bool]) -> None:
    """`ModelError` for the first thing that is asked for and that `backend` doesn't have."""
    for what, is_asked in asked.items():
        if is_asked:
            raise ModelError(f"{backend} has no {what}, which this model needs; try 'sdpa'")


def common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
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
    if dtype not in HALF_DTYPES and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = tuple(t.to(dtype) for t in tensors)
    if dtype not in HALF_DTYPES:
        raise ModelError(
            f"flash attention computes in bfloat16 or float16, got {dtype_name(dtype)}; set bf16 "
            "or dtype, or attn_implementation: sdpa"
        )
    return tensors
