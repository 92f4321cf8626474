"""Preference pairs as token ids: what the packer, the reference and the trainer read.

Not here: reading files (data_sources.py) and understanding columns (data_formats.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenizedPairs:
    """n pairs in flat ragged storage; every response is already cut to `max_length`.

    ids [sum of lengths] int32: prompt, chosen, rejected of pair 0, then of pair 1, and so on.
    offsets [3n + 1] int64: where each of them starts in `ids`; the last entry is len(ids).
    rows [n] int64: the row of the user's dataset that each pair came from.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def _part(self, i: int, which: int) -> np.ndarray:
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"pair {i} of {n}")
        k = 3 * (i % n) + which
        return self.ids[self.offsets[k] : self.offsets[k + 1]]

    def prompt(self, i: int) -> np.ndarray:
        """Prompt token ids of pair i: a view, int32."""
        return self._part(i, 0)

    def chosen(self, i: int) -> np.ndarray:
        """Token ids of pair i's chosen response, without the prompt: a view, int32."""
        return self._part(i, 1)

    def rejected(self, i: int) -> np.ndarray:
        """Token ids of pair i's rejected response, without the prompt: a view, int32."""
        return self._part(i, 2)

    @property
    def lengths(self) -> np.ndarray:
        """[n, 3] int64: tokens in the prompt, the chosen and the rejected response."""
        return np.diff(self.offsets).reshape(-1, 3)

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedPairs:
        """The pairs at `indices`, in that order, repeats allowed; `rows` still name the dataset."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]  # [m, 3]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = self.offsets[3 * indices] if len(indices) else np.zeros(0, np.int64)
        pair_lengths = lengths.sum(1)
        # One gather: position within the new storage, shifted to where that pair lies in the old.
        shift = np.repeat(starts - offsets[:-1:3], pair_lengths)
        ids = self.ids[np.arange(len(shift)) + shift]
        return TokenizedPairs(ids, offsets, self.rows[indices])

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        chosens: Sequence[Sequence[int]],
        rejecteds: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
    ) -> TokenizedPairs:
        """Builds the flat storage from n lists of token ids each; `rows` defaults to 0..n-1."""
        parts = [
            np.asarray(part, dtype=np.int32)
            for pair in zip(prompts, chosens, rejecteds, strict=True)
            for part in pair
        ]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        n = len(parts) // 3
        return cls(ids, offsets, np.asarray(range(n) if rows is None else rows, dtype=np.int64))
