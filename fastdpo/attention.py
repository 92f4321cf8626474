"""Attention over packs, registered with transformers, so that decoders run unpatched.

A packed forward hands its `PackLayout` to the decoder as the keyword `pack_layout`; transformers
passes it on to the attention function, also when gradient checkpointing recomputes a layer. Without
the keyword the functions are transformers' own, so generating and plain forwards work as ever.
No backend here builds a mask over a whole pack, and none applies attention dropout.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from .attention_backends import FLASH, RUN, common_dtype, head_dim, missing_for, refuse
from .attention_flex import flex_attention
from .batch import PackLayout
from .errors import ModelError, did_you_mean
from .rows import gather_rows

logger = logging.getLogger(__name__)

# In the order of preference. Names are transformers', and PyTorch's for its own.
BACKENDS = ("varlen_attn", *FLASH, "flex_attention", "sdpa")

# transformers takes any name with "flash", "flex" or "sdpa" in it for its own.
_REGISTERED = {
    "varlen_attn": "fastdpo_varlen",
    "flash_attention_2": "fastdpo_fa2",
    "flash_attention_3": "fastdpo_fa3",
    "flash_attention_4": "fastdpo_fa4",
    "flex_attention": "fastdpo_blocks",
    "sdpa": "fastdpo_segments",
}


# ---- which backend ---------------------------------------------------------------------------


def usable_backends(
    name: str | None, *, device: torch.device, dtype: torch.dtype, config: PretrainedConfig
) -> list[str]:
    """The backends to try, best first (on a GPU as measured); only `name` if it is given.

    Raises `ModelError` for a name that is no backend, or one that can't run here, with the reason.
    """
    if name is None:
        able = [
            backend
            for backend in BACKENDS
            if missing_for(backend, device=device, dtype=dtype, config=config) is None
        ]
        kernels = [backend for backend in able if backend in ("varlen_attn", *FLASH)]
        # Which is faster may come out otherwise the next time.
        if len(kernels) > 1 and not torch.are_deterministic_algorithms_enabled():
            kernels = list(_by_speed(tuple(kernels), device, dtype, _head_shape(config)))
        return kernels + [backend for backend in able if backend in ("flex_attention", "sdpa")]
    if name not in BACKENDS:
        raise ModelError(
            f"attn_implementation {name!r} can't take packs; choose one of {', '.join(BACKENDS)}"
            f"{did_you_mean(name, BACKENDS)}, leave it out, or set packing_mode: padded"
        )
    missing = missing_for(name, device=device, dtype=dtype, config=config)
    if missing is not None:
        raise ModelError(f"attn_implementation {name!r} can't run here: {missing}; try 'sdpa'")
    return [name]


# ---- how fast: only kernels that need no compiling are timed here; the others come last -------


def _head_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """(query heads, key heads, head size)."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, head_dim(config) or 64


@functools.cache
def _by_speed(
    backends: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
) -> tuple[str, ...]:
    """`backends`, the fastest first, by forward and backward of one pack of 16 pairs.

    The rest keep their order, and the first of them its place unless another is faster by 15 %:
    runs should not differ by a timer's noise. Ranks follow the first.
    """
    layout = _layout_to_time().map_tensors(lambda t: t.to(device))
    times: dict[str, float] = {}
    for backend in backends:
        try:
            times[backend] = _milliseconds(backend, layout, device, dtype, shape)
        except (RuntimeError, ModelError, ImportError) as error:  # built for another device, say
            logger.warning("%s failed when tried: %s", backend, str(error).split("\n")[0])
    shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
    logger.info("attention, forward and backward of one layer: %s", shown)
    order = list(times)
    best = min(order, key=lambda name: times[name], default=None)
    if best is not None and times[best] < 0.85 * times[order[0]]:
        order.remove(best)
        order.insert(0, best)
    chosen = [order]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen, src=0)
    return tuple(chosen[0])


def _layout_to_time() -> PackLayout:
    """16 pairs of like shape: prompts of 256 tokens, responses of 128."""
    from .data import TokenizedPairs
    from .packing import build_pack

    rng = np.random.default_rng(0)
    prompts, chosen, rejected = (
        [rng.integers(1000, size=n).tolist() for _ in range(16)] for n in (256, 129, 129)
    )
    layout = build_pack(
        TokenizedPairs.from_lists(prompts, chosen, rejected), range(16), mode="shared"
    ).layout
    assert layout is not None
    return layout


def _milliseconds(
    backend: str,
    layout: PackLayout,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
) -> float:
    """The median of 5 runs after 2."""
    heads, key_heads, dim = shape
    n_q, n_k = layout.segments[-1][1], layout.segments[-1][3]
    q = torch.randn(n_q, heads, dim, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(n_k, key_heads, dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = RUN[backend](q, k, v, layout, scale=dim**-0.5, window=None, softcap=None, sinks=None)
        torch.autograd.grad(out.sum(), (q, k, v))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[2]


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
    refuse(
        "attention over packs",
        {"position bias": position_bias is not None, "bidirectional layers": is_causal is False},
    )
    query, key, value = common_dtype(query, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    function = flex_attention
    if backend != "flex_attention":
        function, k, v = RUN[backend], gather_rows(k, layout.kv), gather_rows(v, layout.kv)
    out = function(
        q,
        k,
        v,
        layout,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0)


# No part of compiled graphs (body.py): its segments differ from pack to pack.
_uncompiled: Any = torch.compiler.disable(_packed_attention)


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
        out = _uncompiled(
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


def register_backend(backend: str, run: Callable[..., Tensor] | None = None) -> str:
    """Makes `backend` known to transformers; `run`, if given, is what computes it. Returns the
    name under which models take it."""
    if run is not None:
        RUN[backend] = run
        _REGISTERED[backend] = f"fastdpo_{backend}"
    for plain, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        name = registered_name(backend, plain=plain)
        AttentionInterface.register(name, _attention_function(backend, plain))
        AttentionMaskInterface.register(name, mask)
    return registered_name(backend, plain="sdpa")


for _backend in BACKENDS:
    register_backend(_backend)
