"""FlexAttention over packs: one kernel with a block mask, and no repetition of prompts.

A row sees its prompt's rows and those of its own response up to itself, so the mask is two
intervals a row, and keys and values stay as laid out. Which 128 x 128 blocks hold anything is
worked out on the host from the pack's segments; the device never sees a [T, T] mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import PackLayout

BLOCK = 128


def flex_attention(
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
    """q [T, H, D], k and v [T, H_kv, D], all as laid out -> [T, H, D]. Any device and dtype, but
    PyTorch has its backward on CUDA alone."""
    from torch.nn.attention.flex_attention import AuxRequest

    options: dict[str, Any] = {
        "block_mask": _block_mask(layout, window, q.device),
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if softcap is not None:
        options["score_mod"] = _capped(softcap)
    if sinks is not None:
        options["return_aux"] = AuxRequest(lse=True)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, T, D]
    out = _function(q.is_cuda)(q, k, v, **options)
    if sinks is not None:
        out, aux = out
        # A sink is one more key with a value of 0: it only enlarges the softmax's denominator.
        kept = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, -1, 1))  # [1, H, T]
        out = out * kept.unsqueeze(-1).to(out.dtype)
    return out[0].transpose(0, 1)


@functools.cache
def _function(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it multiplies whole matrices: right, and for tests on CPU.
    return torch.compile(flex_attention) if compiled else flex_attention


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _block_mask(layout: PackLayout, window: int | None, device: torch.device) -> Any:
    """The pack's mask under `window`, made by the first layer that needs it."""
    from torch.nn.attention.flex_attention import BlockMask

    if window is not None and window >= layout.max_seqlen_k:
        window = None
    key = ("flex", window)
    if key not in layout.masks:
        n_rows = layout.segments[-1][1]
        if "intervals" not in layout.masks:
            layout.masks["intervals"] = _to_device(_row_intervals(layout), device)
        counts = (_to_device(x, device) for x in _block_lists(layout, window))
        layout.masks[key] = BlockMask.from_kv_blocks(
            *counts,
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_mod(*layout.masks["intervals"].unbind(0), window=window),
            seq_lengths=(n_rows, n_rows),
        )
    return layout.masks[key]


def _mask_mod(start: Tensor, end: Tensor, own: Tensor, *, window: int | None) -> Callable:
    """start, end, own [T]: row q sees rows start..end - 1 (its prompt) and own..q."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_own = (k >= own[q]) & (k <= q)
        seen = is_own | ((k >= start[q]) & (k < end[q]))
        if window is None:
            return seen
        back = torch.where(is_own, q - k, end[q] - k + q - own[q])
        return seen & (back < window)  # a window counts the token itself

    return mask_mod


def _row_intervals(layout: PackLayout) -> np.ndarray:
    """[3, T] int32: for each row where its prompt starts and ends, and where its own rows start.

    In a segment that holds its prompt itself, the prompt is empty and all rows are its own.
    """
    lengths = [end - start for start, end, _, _ in layout.segments]
    per_segment = [
        (*prompt, start)
        for prompt, (start, _, _, _) in zip(layout.prompts, layout.segments, strict=True)
    ]
    return np.repeat(np.array(per_segment, np.int32), lengths, axis=0).T


def _block_lists(layout: PackLayout, window: int | None) -> tuple[np.ndarray, ...]:
    """Per block of queries, how many blocks of keys hold something, and which: first those to be
    masked, then those seen whole. int32 [1, 1, n], [1, 1, n, n], twice."""
    n_rows = layout.segments[-1][1]
    n = -(-n_rows // BLOCK)
    some, whole = np.zeros((n, n), bool), np.zeros((n, n), bool)
    far = window if window is not None else n_rows
    for (first, last, _, _), (start, end) in zip(layout.segments, layout.prompts, strict=True):
        for block in range(first // BLOCK, (last - 1) // BLOCK + 1):
            low, high = max(first, block * BLOCK), min(last, (block + 1) * BLOCK) - 1
            # (oldest key that the block's first row sees, that its last row sees, end of keys that
            # some row sees, end of those that all rows see), in the prompt and in the own rows
            gap = end - first - far + 1  # a prompt's key k lies end - k + row - first behind
            for oldest, oldest_last, until, until_all in (
                (max(start, gap + low), max(start, gap + high), end, end),
                (max(first, low - far + 1), max(first, high - far + 1), high + 1, low + 1),
            ):
                if oldest < until:
                    some[block, oldest // BLOCK : (until - 1) // BLOCK + 1] = True
                if high - low + 1 == BLOCK:
                    whole[block, -(-oldest_last // BLOCK) : until_all // BLOCK] = True
    result = []
    for table in (some & ~whole, whole):
        order = np.argsort(~table, axis=1, kind="stable")
        result += [table.sum(1).astype(np.int32)[None, None], order.astype(np.int32)[None, None]]
    return tuple(result)


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
