"""Rotary embeddings whose frequencies depend on how long the sequence is.

transformers chooses them once for a whole batch, by its longest row. `longrope` (Phi-3, Phi-4-mini)
has two sets, for sequences up to a threshold and beyond it: packs mark the rows of sequences beyond
it, and the embedding is asked twice. `dynamic` has a set for every length past its bound, and keeps
the last one it made: there a sequence past the bound is refused.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_LONG_ROWS: ContextVar[Tensor | None] = ContextVar("long_rows", default=None)


def rotary_bounds(config: PretrainedConfig) -> tuple[int | None, int | None]:
    """(threshold, limit), each None where there is none: the length of the longest sequence with
    the frequencies for short ones, and of the longest that packs can hold."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    thresholds, limits = [], []
    for rope in by_layer_type:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            thresholds.append(
                rope.get("original_max_position_embeddings")
                or getattr(text, "original_max_position_embeddings", None)
                or text.max_position_embeddings
            )
        elif "dynamic" in kind:
            limits.append(text.max_position_embeddings)
    if len(set(thresholds)) > 1:  # more than two kinds of sequences
        return None, min(thresholds + limits)
    return min(thresholds, default=None), min(limits, default=None)


@contextlib.contextmanager
def with_long_rows(long_rows: Tensor | None) -> Iterator[None]:
    """Rows marked in `long_rows`, bool, as laid out, get the frequencies for long sequences."""
    token = _LONG_ROWS.set(long_rows)
    try:
        yield
    finally:
        _LONG_ROWS.reset(token)


def bind_rotary(model: PreTrainedModel) -> None:
    """Makes the model's rotary embeddings heed `with_long_rows`; once is enough."""
    threshold, _ = rotary_bounds(model.config)
    if threshold is None:
        return
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if "longrope" in kinds and not hasattr(module.forward, "_fastdpo"):
            module.forward = types.MethodType(_by_row(module, threshold), module)


def _by_row(module: nn.Module, threshold: int) -> Any:
    plain = getattr(module.forward, "__func__", None) or type(module).forward

    def forward(self: nn.Module, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        long_rows = _LONG_ROWS.get()
        if long_rows is None:
            return plain(self, x, position_ids, *args, **kwargs)
        long_rows = long_rows.view(-1, position_ids.shape[-1])
        # The embedding looks at the largest position only: without the long rows, it is short. A
        # short row's padding may reach further, and nobody reads it.
        within = position_ids.where(~long_rows, 0).clamp(max=threshold - 1)
        short = plain(self, x, within, *args, **kwargs)
        long = plain(self, x, position_ids, *args, **kwargs)
        return tuple(
            torch.where(long_rows[..., None], b, a) for a, b in zip(short, long, strict=True)
        )

    forward._fastdpo = True  # type: ignore[attr-defined]
    return forward
