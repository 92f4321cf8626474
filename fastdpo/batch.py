"""What one forward and backward pass works on: a pack, and the layout that its attention needs.

Plain data, built by packing.py and read by attention.py, logps.py and the losses. Host tuples and
ints stand beside device tensors so that no step ever has to read a size back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .rows import RowGather


@dataclass(eq=False)  # not frozen: torch.compile of PyTorch 2.11 would compile for its sizes
class PackLayout:
    """S attention segments over one row of T tokens; T_k keys after prompts are repeated.

    kv: the gather of T_k key/value rows from the T rows as laid out.
    segments: S of (q_start, q_end, k_start, k_end), queries in the row, keys among the T_k; a query
        sees the keys up to its own place, aligned at the segment's end (bottom-right).
    prompts: S of (start, end): the rows whose keys are repeated before the segment's own; empty in
        a segment that holds its prompt itself.
    cu_seqlens_q, cu_seqlens_k [S + 1] int32: the same bounds as flash attention wants them.
    masks: what a backend makes of the segments, by window, for all layers.
    trace: where attention notes its calls while a model is probed; None otherwise.
    """

    kv: RowGather
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    segments: tuple[tuple[int, int, int, int], ...]
    prompts: tuple[tuple[int, int], ...]
    max_seqlen_q: int
    max_seqlen_k: int
    masks: dict = field(default_factory=dict, compare=False, repr=False)
    trace: list | None = field(default=None, compare=False, repr=False)

    @property
    def kv_index(self) -> Tensor:
        """[T_k] int64: the row of the pack that each key and value comes from."""
        return self.kv.index

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> PackLayout:
        return replace(
            self,
            kv=self.kv.map_tensors(fn),
            cu_seqlens_q=fn(self.cu_seqlens_q),
            cu_seqlens_k=fn(self.cu_seqlens_k),
            masks={},
        )


@dataclass(frozen=True)
class Pack:
    """P pairs as R distinct responses with N scored tokens, on T input tokens.

    input_ids [T] int64, or [B, L] where `attention_mask` [B, L] is set (padded mode).
    position_ids [T] int64: a response's start at its prompt's length; None in padded mode.
    layout: None in padded mode.
    predict: the gather of the N rows (of T, or of B * L) that predict the targets.
    multiplicity [T] or [B, L] fp32: how many tokens of the 2P sequences one by one each row stands
        for; 0 for padding.
    targets [N] int64; cu_responses [R + 1] int32: scored tokens of each response, in order.
    pairs [P, 2] int64: the chosen and the rejected response of each pair.
    pair_ids [P] (host): the pair's index in the TokenizedPairs.
    responses: R of (pair id, side), the first pair that has it; side 0 is chosen, 1 rejected.
    long_rows [T] or [B, L] bool: which rows belong to sequences of more than `rope_threshold`
        tokens, whose rotary frequencies are others; None where there are none.
    max_seqlen: the longest sequence (prompt and response, without its last token unless it is laid
        out too).
    n_tokens: tokens through the model, padding included. n_tokens_unshared: those of the 2P
        sequences one by one. n_tokens_padded: those of a [2P, longest] batch of whole sequences.
    columns: the dataset's own numbers for these pairs, [P] fp64 each.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    layout: PackLayout | None
    attention_mask: Tensor | None
    predict: RowGather
    multiplicity: Tensor
    targets: Tensor
    cu_responses: Tensor
    pairs: Tensor
    pair_ids: np.ndarray
    responses: tuple[tuple[int, int], ...]
    max_seqlen: int
    n_tokens: int
    n_tokens_unshared: int
    n_tokens_padded: int
    rope_threshold: int | None = None
    long_rows: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def predict_index(self) -> Tensor:
        """[N] int64: the row that predicts each target."""
        return self.predict.index

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> Pack:
        return replace(
            self,
            input_ids=fn(self.input_ids),
            position_ids=None if self.position_ids is None else fn(self.position_ids),
            layout=None if self.layout is None else self.layout.map_tensors(fn),
            attention_mask=None if self.attention_mask is None else fn(self.attention_mask),
            predict=self.predict.map_tensors(fn),
            multiplicity=fn(self.multiplicity),
            long_rows=None if self.long_rows is None else fn(self.long_rows),
            targets=fn(self.targets),
            cu_responses=fn(self.cu_responses),
            pairs=fn(self.pairs),
            columns={name: fn(values) for name, values in self.columns.items()},
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pack:
        """The same pack on `device`."""
        return self.map_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Pack:
        """The same pack in page-locked host memory, from which copies to a GPU can overlap."""
        return self.map_tensors(Tensor.pin_memory)
