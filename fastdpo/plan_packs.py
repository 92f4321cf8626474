"""Which packs of a run decide its peak: the heaviest of the first step, and those of the others.

Until the first update there are no optimizer states, and until a step's second pack no gradients:
a pack that comes early may be heavier than those that come later, and still not decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batch import Pack
from .data import TokenizedPairs
from .packing import pair_costs
from .steps import Packer, order_of_epoch, steps_of_epoch

MOST_EPOCHS = 10  # of a longer run's orders so many are looked at
HEAVY_STEPS = 3  # by each measure
AS_HEAVY = 0.98  # a pack within 2 % of another, by every measure, needs no replay of its own


@dataclass(frozen=True)
class HeavyPack:
    """A pack, and what is there when it begins: optimizer states, gradients of earlier packs.

    size: its tokens, scored tokens, rows of keys and longest pair, [4].
    """

    pack: Pack
    size: np.ndarray
    has_states: bool
    has_gradients: bool

    def at_most(self, other: HeavyPack, total: int, gradients: int) -> float:
        """Bytes that it takes at most, where `other` takes `total` and gradients are `gradients`.

        Activations grow in proportion to some mixture of the sizes, so to the one that grows most
        at most; gradients do not grow.
        """
        ratio = float((self.size / other.size.clip(1)).max())
        if self.has_gradients and not other.has_gradients:
            total += gradients
        return ratio * total + max(1 - ratio, 0) * gradients


def steps_of_run(pairs: TokenizedPairs, args: Any) -> list[np.ndarray]:
    """The pair ids of each of this rank's steps, in order; of the first ten epochs."""
    per_epoch = max(steps_of_epoch(pairs, args), 1)
    by_epochs = math.ceil(args.num_train_epochs * per_epoch)
    n_steps = args.max_steps if args.max_steps > 0 else by_epochs
    n_epochs = min(-(-n_steps // per_epoch), MOST_EPOCHS)
    orders = [ids for epoch in range(n_epochs) for ids in order_of_epoch(pairs, args, epoch)]
    orders = orders or [np.arange(len(pairs))]  # fewer than a step: training says so
    return [ids[args.process_index :: args.world_size] for ids in orders[:n_steps]]


class HeavyPacks:
    """The packs of `steps` that may decide; `states_from`: the first step that finds states."""

    def __init__(
        self, pairs: TokenizedPairs, packer: Packer, steps: Sequence[np.ndarray], states_from: int
    ):
        self.pairs, self.packer = pairs, packer
        mode, with_last = packer.mode, packer.with_last
        # What memory grows with: tokens, scored ones, and rows of keys; and the longest pair.
        self.costs = pair_costs(pairs, mode, with_last)
        scored = pairs.lengths[:, 1:].sum(axis=1)
        self.measures = np.stack([self.costs, scored, pair_costs(pairs, "unshared", with_last)])
        early, late = steps[:states_from], steps[states_from:]
        self.steps = [
            (ids, has_states)
            for group, has_states in ((early, False), (late, True))
            for ids in self._heavy_steps(group)
        ]

    def _heavy_steps(self, steps: Sequence[np.ndarray]) -> list[np.ndarray]:
        if not len(steps):
            return []
        sizes = np.array([self.measures[:, ids].sum(axis=1) for ids in steps])  # [steps, 3]
        longest = np.array([self.costs[ids].max(initial=0) for ids in steps])
        chosen = {int(k) for column in sizes.T for k in np.argsort(-column)[:HEAVY_STEPS]}
        return [steps[k] for k in sorted(chosen | {int(longest.argmax())})]

    def of_tokens(self, max_tokens: int) -> tuple[list[HeavyPack], int]:
        """Packs of at most `max_tokens` tokens such that no other is heavier in every way, large
        ones first; and how many packs a step has at most."""
        packer = self.packer.of_tokens(max_tokens)
        found: dict[tuple, tuple[np.ndarray, bool, bool]] = {}
        n_packs = 1
        for step, has_states in self.steps:
            planned = packer.plan(self.pairs, step)
            n_packs = max(n_packs, len(planned))
            for place, ids in enumerate(planned):
                key = (tuple(ids), has_states, place > 0)
                found[key] = (self._size(ids), has_states, place > 0)
        order = sorted(found, key=lambda key: (-found[key][0].sum(), not key[1], not key[2]))
        kept: list[tuple] = []
        for key in order:
            if not any(_as_heavy(found[other], found[key]) for other in kept):
                kept.append(key)
        packs = [
            HeavyPack(packer.pack(self.pairs, list(ids)), *found[ids, has_states, has_gradients])
            for ids, has_states, has_gradients in kept
        ]
        return packs, n_packs

    def _size(self, ids: Sequence[int]) -> np.ndarray:
        size = self.measures[:, list(ids)].sum(axis=1)
        if self.packer.mode == "padded":
            size[0] = len(ids) * self.costs[list(ids)].max()
        return np.append(size, self.costs[list(ids)].max())


def _as_heavy(one: tuple[np.ndarray, bool, bool], other: tuple[np.ndarray, bool, bool]) -> bool:
    """Whether `one` takes as much as `other` in every way, but for a hair."""
    (size, *there), (other_size, *other_there) = one, other
    return bool((size >= AS_HEAVY * other_size).all()) and all(
        a >= b for a, b in zip(there, other_there, strict=True)
    )
