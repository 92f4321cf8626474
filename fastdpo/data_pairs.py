"""Pairs as token ids in flat storage, and unpaired examples in the same form.

An example of unpaired data (KTO's) is kept as a pair whose second response is a *mismatched* one:
another example's response behind this prompt, from which KTO estimates its KL baseline. So packs,
shared prompts, references and their cache serve both. It stays the same in every epoch and order
of sampling, lest its reference be computed again. Rows and tokenizers: data.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import DataError


@dataclass(frozen=True)
class TokenizedPairs:
    """n pairs in flat ragged storage; every response is already cut to `max_length`.

    ids [sum of lengths] int32: prompt, chosen, rejected of pair 0, then of pair 1, and so on.
    offsets [3n + 1] int64: where each of them starts in `ids`; the last entry is len(ids).
    rows [n] int64: the row of the user's dataset that each pair came from.
    columns: numbers of the dataset's own that losses use (`weight`, …), [n] fp64 each.
    Unpaired examples: chosen is the example's response, rejected a mismatched one, and the column
    `label` is 1 where the response is desirable.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

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

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[n, 3] int64: tokens in the prompt, the chosen and the rejected response."""
        return np.diff(self.offsets).reshape(-1, 3)

    def check_ids(self, n_embeddings: int, name: str) -> None:
        """`DataError` naming the row of dataset `name` with an id that a model lacks."""
        beyond = np.flatnonzero((self.ids < 0) | (self.ids >= n_embeddings))
        if len(beyond):
            pair = (np.searchsorted(self.offsets, beyond[0], "right") - 1) // 3
            raise DataError(
                f"{name} row {self.rows[pair]}: token id {self.ids[beyond[0]]}, and the model has "
                f"embeddings for [0, {n_embeddings}); use its own tokenizer, or "
                "model.resize_token_embeddings"
            )

    @property
    def _starts(self) -> np.ndarray:
        """[n, 3] int64: where prompt, chosen and rejected response start in `ids`."""
        return self.offsets[:-1].reshape(-1, 3)

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedPairs:
        """The pairs at `indices`, in that order, repeats allowed; `rows` still name the dataset."""
        indices = np.asarray(indices, dtype=np.int64)
        ids, offsets = _gather(self.ids, self._starts[indices], self.lengths[indices])
        columns = {name: values[indices] for name, values in self.columns.items()}
        return TokenizedPairs(ids, offsets, self.rows[indices], columns)

    def cut(self, max_length: int) -> TokenizedPairs:
        """The pairs with responses cut to `max_length` tokens, prompt included; without those
        whose prompt leaves no room."""
        keep = self.lengths[:, 0] < max_length
        starts, lengths = self._starts[keep], self.lengths[keep]
        lengths[:, 1:] = np.minimum(lengths[:, 1:], max_length - lengths[:, :1])
        ids, offsets = _gather(self.ids, starts, lengths)
        columns = {name: values[keep] for name, values in self.columns.items()}
        return TokenizedPairs(ids, offsets, self.rows[keep], columns)

    @functools.cached_property
    def scored_lengths(self) -> np.ndarray:
        """[n, 2] int64: scored tokens of chosen and rejected. Behind an empty prompt nothing
        predicts a response's first token: it is not scored."""
        lengths = self.lengths
        unscored = (lengths[:, :1] == 0) & (lengths[:, 1:] > 0)
        return lengths[:, 1:] - unscored

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


def _gather(
    ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The spans of `ids` that begin at `starts` [n, 3], end to end, and their offsets [3n + 1]."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    # Position within the new storage, shifted to where that span lies in the old.
    shift = np.repeat(starts.reshape(-1) - offsets[:-1], lengths.reshape(-1))
    return ids[np.arange(len(shift)) + shift], offsets


# ---- unpaired examples -----------------------------------------------------------------------

_ROWS_PER_RUN = 1000  # of TRL's `unpair_preference_dataset`, whose order ours is


def unpaired(pairs: TokenizedPairs) -> TokenizedPairs:
    """Every pair as two examples, the chosen response desirable and the rejected one not: of each
    run of 1000 rows first all chosen, then all rejected responses, as TRL has it."""
    run = pairs.rows // _ROWS_PER_RUN
    side = np.repeat([0, 1], len(pairs))  # [2n]
    order = np.lexsort((side, np.tile(run, 2)))  # stable: rows keep their order
    side, index = side[order], np.tile(np.arange(len(pairs)), 2)[order]
    parts = np.stack([np.zeros_like(side), 1 + side, 1 + side], 1)  # prompt, response, response
    at = index[:, None], parts
    ids, offsets = _gather(pairs.ids, pairs._starts[at], pairs.lengths[at])
    columns = {name: values[index] for name, values in pairs.columns.items()}
    columns["label"] = (side == 0).astype(np.float64)
    return TokenizedPairs(ids, offsets, pairs.rows[index], columns)


def mismatch_sources(n: int, block: int) -> np.ndarray:
    """[n]: the example whose response each of `n` examples is given as its mismatched one.

    Of every `block` examples the first takes the last one's response and the others that of the
    one before them (KTO, arXiv 2402.01306 sec. 4.1: outputs shifted by one within a batch; TRL's
    rotation). A last block of a single example joins the one before, lest it keep its own response.
    With `block` 1 all do, for losses without a KL baseline: packs hold equal responses once.
    """
    firsts = np.arange(0, n, block)
    if block > 1 and len(firsts) > 1 and n - firsts[-1] == 1:
        firsts = firsts[:-1]
    sources = np.arange(n) - 1
    sources[firsts] = np.append(firsts[1:], n) - 1
    return sources


def with_mismatches(
    examples: TokenizedPairs, sources: np.ndarray, max_length: int | None
) -> TokenizedPairs:
    """The examples with the responses of `sources` as their second ones, all cut to `max_length`
    behind the prompt that they now have."""
    starts, lengths = examples._starts.copy(), examples.lengths.copy()
    starts[:, 2], lengths[:, 2] = starts[sources, 1], lengths[sources, 1]
    if max_length is not None:
        lengths[:, 1:] = np.minimum(lengths[:, 1:], max_length - lengths[:, :1])
    ids, offsets = _gather(examples.ids, starts, lengths)
    return TokenizedPairs(ids, offsets, examples.rows, examples.columns)


def without_mismatches(examples: TokenizedPairs) -> TokenizedPairs:
    """The examples with their own responses as second ones, of which packs hold equal ones once."""
    return with_mismatches(examples, np.arange(len(examples)), None)
